"""Sampling from numpy's logits, in the native library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inflight.contract import Array, Sampling, Watermark
from inflight.kernels import Row, Sampled, log_softmax_at, sample
from inflight.models import ModelArray
from inflight.shard.sampler import RowState, Sampler

_NOTHING = np.empty(0, np.int32)


class NativeSampler(Sampler):
    """One call for all rows.

    Args:
        threads: that share them.
        isa: one of `instruction_sets`; None: the best.
    """

    def __init__(self, threads: int, watermark: Watermark = Watermark(), isa: str | None = None) -> None:
        self._threads = threads
        self._watermark = watermark
        self._isa = isa

    def sample(
        self,
        logits: ModelArray,
        sampling: Sequence[Sampling],
        state: Callable[[int], RowState],
        masks: Mapping[int, bytes] | None = None,
        best: Array | None = None,
    ) -> Sampled:
        rows = []
        for place, each in enumerate(sampling):
            mask = masks.get(place) if masks else None
            if each.greedy and mask is None:
                rows.append(Row(each, _NOTHING, 0))
                continue
            known = state(place)
            rows.append(Row(each, known.tokens, known.num_prompt, mask))
        return sample(logits, rows, self._threads, best, self._watermark, self._isa)

    def prompt_logprobs(self, logits: ModelArray, following: Array) -> list[float]:
        values: list[float] = log_softmax_at(logits, following, self._threads, self._isa).tolist()
        return values

    def on_host(self, rows: ModelArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        found: np.ndarray[Any, np.dtype[np.float32]] = rows
        return found
