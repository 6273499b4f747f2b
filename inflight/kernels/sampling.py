"""From logits to tokens natively, each row by itself; `shard/torch_sampler.py` is the reference in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from inflight.contract import Array, Sampling, Watermark
from inflight.kernels.library import native

WATERMARK_KEY = 15485863
"""TGI's."""


class Row(NamedTuple):
    """What the next token of one row follows from, beside its logits.

    Attributes:
        tokens: int32, known tokens, prompt first; contiguous.
        num_prompt: how many of them are the prompt.
        mask: which tokens its grammar allows (see `StepPlan.masks`); None: all.
    """

    sampling: Sampling
    tokens: Array
    num_prompt: int
    mask: bytes | None = None


@dataclass(frozen=True)
class Sampled:
    """Aligned with the rows of the logits.

    Attributes:
        tokens: int64 [S].
        logprobs: float32 [S] after all processors, where any row asked; those of rows that did not are any.
        top: per row, pairs (token, log-probability), best first; empty where none were asked for.
        unsound: rows whose logits are not all numbers; nobody may use their tokens.
    """

    tokens: Array
    logprobs: Array | None
    top: list[list[tuple[int, float]]]
    unsound: list[int] = field(default_factory=list)


def sample(
    logits: Array,
    rows: Sequence[Row],
    threads: int,
    best: Array | None = None,
    watermark: Watermark = Watermark(),
    isa: str | None = None,
) -> Sampled:
    """Chooses the next token of every row.

    Args:
        logits: float32 [S, V], each row contiguous; changed in place.
        rows: S of them.
        threads: that share the rows.
        best: int64 [S], the first of the largest logits, where the model has found it already; -1 of a row whose logits
            are not all numbers.
        isa: one of `instruction_sets`; None: the best.
    """
    assert logits.dtype == np.float32, "logits are float32"
    assert logits.shape[0] == len(rows), "a row of logits for each row"
    assert logits.strides[1] == 4, "the logits of a row lie together"
    tokens = np.zeros(len(rows), np.int64) if best is None else best.astype(np.int64)
    none = np.flatnonzero(tokens < 0)
    tokens[none] = 0
    logprobs = np.zeros(len(rows), np.float32)
    top: list[list[tuple[int, float]]] = [[] for _ in rows]
    work = [
        (place, _native(each.sampling, watermark), each.tokens, each.num_prompt, each.mask)
        for place, each in enumerate(rows)
        if best is None or each.mask is not None or not each.sampling.greedy
    ]
    found, unsound = _sampler(max(1, threads), isa or "").sample(
        logits.ctypes.data, logits.strides[0] // 4, logits.shape[1], work, tokens.ctypes.data, logprobs.ctypes.data
    )
    for place, pairs in found:
        top[place] = pairs
    asked = any(each.sampling.logprobs or each.sampling.top_n_tokens for each in rows)
    # A grammar's mask hides what is no number behind it; the model has seen it.
    unsound = sorted({*unsound, *none.tolist()}) if len(none) else unsound
    return Sampled(tokens, logprobs if asked else None, top, unsound)


def log_softmax_at(logits: Array, tokens: Array, threads: int = 1, isa: str | None = None) -> Array:
    """Log-probabilities float32 [n] of one token of each row; NaN where a row's are not defined.

    Args:
        logits: float32 [n, V], each row contiguous.
        tokens: [n].
        isa: as for `sample`.
    """
    assert logits.dtype == np.float32, "logits are float32"
    assert len(tokens) == logits.shape[0], "a token for each row"
    assert logits.strides[1] == 4, "the logits of a row lie together"
    chosen = np.ascontiguousarray(tokens, np.int64)
    values: Array = np.empty(len(chosen), np.float32)
    _sampler(max(1, threads), isa or "").log_softmax_at(
        logits.ctypes.data, len(chosen), logits.strides[0] // 4, logits.shape[1], chosen.ctypes.data, values.ctypes.data
    )
    return values


@lru_cache(maxsize=8)
def _sampler(threads: int, isa: str) -> Any:
    return native.Sampler(threads, isa)


@lru_cache(maxsize=4096)
def _native(sampling: Sampling, watermark: Watermark) -> Any:
    """The same for the native library; rows keep theirs from step to step."""
    found = native.Sampling()
    found.draw = sampling.do_sample
    found.temperature = sampling.temperature
    found.top_k = sampling.top_k
    found.top_p = sampling.top_p
    found.min_p = sampling.min_p
    found.typical_p = sampling.typical_p
    found.repetition = sampling.repetition_penalty
    found.frequency = sampling.frequency_penalty
    found.presence = sampling.presence_penalty
    found.bias = list(sampling.logit_bias)
    found.seed = sampling.seed
    found.logprob = sampling.logprobs
    found.top = sampling.top_n_tokens
    found.watermark = sampling.watermark
    found.key, found.gamma, found.delta = WATERMARK_KEY, *watermark
    return found
