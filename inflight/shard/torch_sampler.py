"""Chooses tokens from logits on torch's operators, each row by itself.

Processors change only the rows that ask for them, with operations along the vocabulary, so that a row's distribution
does not depend on its neighbours. A draw uses one uniform number per token, a hash of (seed, position): the same for
a replayed row, whatever batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from inflight.contract import Array, Sampling, Watermark
from inflight.kernels import Sampled, top_k
from inflight.models import ModelArray
from inflight.nn import to_array, to_tensor
from inflight.shard.sampler import RowState, Sampler, SamplerInput

WATERMARK_KEY = 15485863
"""The hash key of watermarks, TGI's value."""

COLDEST = 1e-5
"""Below this temperature a draw always takes the largest logit; a smaller divider would overflow float32."""

_MASK = (1 << 64) - 1


class TorchSampler(Sampler):
    """A sampler on torch's operators, on the device of the logits."""

    def __init__(self, watermark: Watermark = Watermark()) -> None:
        self._watermark = watermark

    def _sample(self, given: SamplerInput) -> Sampled:
        with torch.inference_mode():
            return sample(given.logits, given.sampling, given.state, given.masks, given.best, self._watermark)

    def prompt_logprobs(self, logits: ModelArray, following: Array) -> list[float]:
        with torch.inference_mode():
            return prompt_logprobs(logits, following)

    def on_host(self, rows: ModelArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        return to_array(rows.float())


def sample(
    logits: torch.Tensor,
    sampling: Sequence[Sampling],
    state: Callable[[int], RowState],
    masks: Mapping[int, bytes] | None = None,
    best: Array | None = None,
    watermark: Watermark = Watermark(),
) -> Sampled:
    """See `Sampler.sample`."""
    highest = logits.amax(dim=-1)  # NaN if a logit is NaN; taken before a mask hides it
    changed = bool(masks) or not all(params.plain for params in sampling)
    if changed:
        _process(logits, sampling, state, masks or {}, watermark)
    tokens = torch.argmax(logits, dim=-1) if changed or best is None else torch.from_numpy(best.copy())
    drawn = [row for row, params in enumerate(sampling) if params.do_sample]
    if drawn:
        uniform = [_uniform(sampling[row].seed, len(state(row).tokens)) for row in drawn]
        tokens[drawn] = _draw(_rows(logits, drawn), uniform)
    logprobs: Array | None = None
    top: list[list[tuple[int, float]]] = [[] for _ in sampling]
    asked = [row for row, params in enumerate(sampling) if params.logprobs or params.top_n_tokens]
    if asked:
        normal = torch.log_softmax(_rows(logits, asked), dim=-1)
        values = torch.zeros(len(sampling), dtype=torch.float32, device=logits.device)
        values[asked] = normal.gather(1, tokens[asked].unsqueeze(1)).squeeze(1)
        logprobs = values.cpu().numpy()
        for place, row in enumerate(asked):
            if sampling[row].top_n_tokens:
                top[row] = _top(normal[place], sampling[row].top_n_tokens)
    chosen: Array = tokens.cpu().numpy()
    unsound: list[int] = np.flatnonzero(np.isnan(highest.cpu().numpy())).tolist()
    chosen[unsound] = 0
    return Sampled(chosen, logprobs, top, unsound)


def prompt_logprobs(logits: torch.Tensor, following: Array) -> list[float]:
    """See `Sampler.prompt_logprobs`."""
    targets = torch.from_numpy(following.astype(np.int64)).to(logits.device)
    values: list[float] = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
    return values


def _process(
    logits: torch.Tensor,
    sampling: Sequence[Sampling],
    state: Callable[[int], RowState],
    masks: Mapping[int, bytes],
    watermark: Watermark = Watermark(),
) -> None:
    """Changes the logits of rows that ask for it."""
    for row, params in enumerate(sampling):
        if params.watermark:
            _watermark(logits[row], int(state(row).tokens[-1]), watermark)
        if params.repetition_penalty != 1.0:
            _repetition(logits[row], state(row), params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            _frequency(logits[row], state(row), params.frequency_penalty, params.presence_penalty)
        if params.logit_bias:
            index = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
            bias = torch.tensor([value for _, value in params.logit_bias], device=logits.device)
            logits[row].index_add_(0, index, bias)
    for row, bits in masks.items():
        logits[row].masked_fill_(_forbidden(bits, logits), -torch.inf)
    warm = [row for row, params in enumerate(sampling) if params.temperature != 1.0]
    if warm:
        divider = _column(logits, [max(sampling[row].temperature, COLDEST) for row in warm])
        logits[warm] = _rows(logits, warm) / divider
    for wants, filter_rows in (
        ([params.top_k > 0 for params in sampling], _top_k),
        ([params.top_p < 1.0 for params in sampling], _top_p),
        ([params.min_p > 0.0 for params in sampling], _min_p),
        ([params.typical_p < 1.0 for params in sampling], _typical_p),
    ):
        rows = [row for row, wanted in enumerate(wants) if wanted]
        if rows:
            part = _rows(logits, rows)
            logits[rows] = part.masked_fill(filter_rows(part, [sampling[row] for row in rows]), -torch.inf)


def _forbidden(bits: bytes, logits: torch.Tensor) -> torch.Tensor:
    """The tokens that a mask forbids, including all beyond its end."""
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: logits.shape[-1]]
    forbidden = np.ones(logits.shape[-1], np.bool_)
    forbidden[: len(allowed)] = allowed == 0
    return torch.from_numpy(forbidden).to(logits.device)


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _column(logits: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=logits.dtype, device=logits.device).unsqueeze(1)


def _repetition(row: torch.Tensor, state: RowState, penalty: float) -> None:
    """Penalises every token seen, once: divides positive scores, multiplies negative ones (Keskar et al., 2019)."""
    seen = torch.from_numpy(np.unique(state.tokens).astype(np.int64)).to(row.device)
    scores = row[seen]
    row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _watermark(row: torch.Tensor, before: int, watermark: Watermark) -> None:
    """Adds a bonus to a green list of tokens, derived from the previous token (Kirchenbauer et al., 2023)."""
    generator = torch.Generator().manual_seed(WATERMARK_KEY * before)
    size = row.shape[0]
    green = torch.randperm(size, generator=generator)[: int(size * watermark.gamma)]
    row[green.to(row.device)] += watermark.delta


def _frequency(row: torch.Tensor, state: RowState, frequency: float, presence: float) -> None:
    tokens, counts = np.unique(state.tokens[state.num_prompt :], return_counts=True)
    if not len(tokens):
        return
    index = torch.from_numpy(tokens.astype(np.int64)).to(row.device)
    row[index] -= frequency * torch.from_numpy(counts.astype(np.float32)).to(row.device) + presence


def _top_k(logits: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """Tokens that are less likely than the k-th most likely one; ties with it stay."""
    most = min(max(params.top_k for params in sampling), logits.shape[-1])
    best = _largest(logits, most)
    place = torch.tensor([min(params.top_k, logits.shape[-1]) - 1 for params in sampling], device=logits.device)
    return logits < best.gather(1, place.unsqueeze(1))


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, largest first; by the native library if there is one."""
    top = top_k(logits.numpy(), k) if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    return torch.topk(logits, k, dim=-1).values if top is None else to_tensor(top.values)


def _top_p(logits: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """Tokens outside the smallest set of most likely ones with probability top_p (Holtzman et al., 2019)."""
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    before = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
    before = before - torch.softmax(ordered, dim=-1)
    tail = before >= _column(logits, [params.top_p for params in sampling])
    tail[:, 0] = False
    return torch.zeros_like(tail).scatter(1, index, tail)


def _min_p(logits: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """Tokens that are less likely than min_p times the most likely one (Nguyen et al., 2024)."""
    limit = logits.amax(dim=-1, keepdim=True) + torch.log(_column(logits, [params.min_p for params in sampling]))
    return logits < limit


def _typical_p(logits: torch.Tensor, sampling: list[Sampling]) -> torch.Tensor:
    """Tokens outside the smallest set of most typical surprise with probability typical_p (Meister et al., 2022)."""
    normal = torch.log_softmax(logits, dim=-1)
    probs = normal.exp()
    entropy = -(normal.masked_fill(probs == 0, 0.0) * probs).sum(dim=-1, keepdim=True)
    distance = (-normal - entropy).abs()
    _, index = torch.sort(distance, dim=-1, stable=True)
    ordered = probs.gather(1, index)
    before = ordered.cumsum(dim=-1) - ordered
    tail = before >= _column(logits, [params.typical_p for params in sampling])
    tail[:, 0] = False
    return torch.zeros_like(tail).scatter(1, index, tail)


def _draw(logits: torch.Tensor, uniform: list[float]) -> torch.Tensor:
    """Draws a token per row: the inverse cumulative distribution, in float64, at the row's uniform number."""
    probs = torch.softmax(logits.double(), dim=-1)
    sums = probs.cumsum(dim=-1)
    wanted = torch.tensor(uniform, dtype=torch.float64, device=logits.device).unsqueeze(1) * sums[:, -1:]
    # `right`: a number on the border of a token of probability 0 must not draw it.
    index = torch.searchsorted(sums, wanted, right=True).squeeze(1)
    last = (probs > 0).double().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index, last)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1): two rounds of the splitmix64 finaliser over seed and position."""
    mixed = _mix((_mix(seed) + position * 0x9E3779B97F4A7C15) & _MASK)
    return (mixed >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _top(row: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The most likely tokens, ties with the last one included, best first and then by number."""
    limit = _largest(row.unsqueeze(0), min(count, row.shape[0]))[0, -1]
    tokens = torch.nonzero((row >= limit) & (row > -torch.inf)).squeeze(1)
    pairs = sorted(zip((-row[tokens]).tolist(), tokens.tolist()))
    return [(token, -value) for value, token in pairs]
