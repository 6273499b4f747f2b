"""Chooses tokens from logits in the native library; `shard/torch_sampler.py` is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from inflight.contract import Array, Sampling, Watermark
from inflight.kernels.library import native

WATERMARK_KEY = 15485863
"""The hash key of watermarks, TGI's value."""


class SamplerRow(NamedTuple):
    """The state of one row from which its next token is chosen, beside its logits.

    Attributes:
        tokens: int32, known tokens, prompt first; contiguous.
        num_prompt: how many of them are the prompt.
        mask: the tokens that its grammar allows (see `StepPlan.masks`); None: all.
    """

    sampling: Sampling
    tokens: Array
    num_prompt: int
    mask: bytes | None = None


@dataclass(frozen=True)
class Sampled:
    """The chosen tokens, aligned with the rows of the logits.

    Attributes:
        tokens: int64 [S].
        logprobs: float32 [S] after all processors; None if no row asked; undefined for rows that did not ask.
        top: per row, pairs (token, log-probability), best first; empty where none were asked for.
        unsound: rows whose logits are not all numbers; their tokens must not be used.
    """

    tokens: Array
    logprobs: Array | None
    top: list[list[tuple[int, float]]]
    unsound: list[int] = field(default_factory=list)


def sample(
    logits: Array,
    rows: Sequence[SamplerRow],
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
        best: int64 [S], the index of each row's largest logit (of equal ones the first; -1: a logit is not a number),
            if the model has computed it.
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
        (place, _native(row.sampling, watermark), row.tokens, row.num_prompt, row.mask)
        for place, row in enumerate(rows)
        if best is None or row.mask is not None or not row.sampling.greedy
    ]
    tops, unsound = _sampler(max(1, threads), isa or "").sample(
        logits.ctypes.data, logits.strides[0] // 4, logits.shape[1], work, tokens.ctypes.data, logprobs.ctypes.data
    )
    for place, pairs in tops:
        top[place] = pairs
    asked = any(row.sampling.logprobs or row.sampling.top_n_tokens for row in rows)
    # A grammar's mask hides logits that are not numbers from the sampler, but the model has reported them in `best`.
    unsound = sorted({*unsound, *none.tolist()}) if len(none) else unsound
    return Sampled(tokens, logprobs if asked else None, top, unsound)


def log_softmax_at(logits: Array, tokens: Array, threads: int = 1, isa: str | None = None) -> Array:
    """Log-probabilities float32 [n] of one token of each row; NaN if a row has undefined ones.

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
    """The native library's record of a row's parameters, cached because rows keep theirs from step to step."""
    record = native.Sampling()
    record.draw = sampling.do_sample
    record.temperature = sampling.temperature
    record.top_k = sampling.top_k
    record.top_p = sampling.top_p
    record.min_p = sampling.min_p
    record.typical_p = sampling.typical_p
    record.repetition = sampling.repetition_penalty
    record.frequency = sampling.frequency_penalty
    record.presence = sampling.presence_penalty
    record.bias = list(sampling.logit_bias)
    record.seed = sampling.seed
    record.logprob = sampling.logprobs
    record.top = sampling.top_n_tokens
    record.watermark = sampling.watermark
    record.key, record.gamma, record.delta = WATERMARK_KEY, *watermark
    return record
