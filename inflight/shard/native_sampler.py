"""The sampler for numpy's logits, in the native library."""

from __future__ import annotations

from typing import Any

import numpy as np

from inflight.contract import Array, Watermark
from inflight.kernels import Sampled, SamplerRow, log_softmax_at, sample
from inflight.models import ModelArray
from inflight.shard.sampler import Sampler, SamplerInput

_NO_TOKENS = np.empty(0, np.int32)


class NativeSampler(Sampler):
    """Samples all rows in one native call.

    Args:
        threads: that share the rows.
        isa: one of `instruction_sets`; None: the best.
    """

    def __init__(self, threads: int, watermark: Watermark = Watermark(), isa: str | None = None) -> None:
        self._threads = threads
        self._watermark = watermark
        self._isa = isa

    def _sample(self, given: SamplerInput) -> Sampled:
        rows = []
        for place, sampling in enumerate(given.sampling):
            mask = given.masks.get(place)
            if sampling.greedy and mask is None:
                rows.append(SamplerRow(sampling, _NO_TOKENS, 0))
                continue
            known = given.state(place)
            rows.append(SamplerRow(sampling, known.tokens, known.num_prompt, mask))
        return sample(given.logits, rows, self._threads, given.best, self._watermark, self._isa)

    def prompt_logprobs(self, logits: ModelArray, following: Array) -> list[float]:
        values: list[float] = log_softmax_at(logits, following, self._threads, self._isa).tolist()
        return values

    def on_host(self, rows: ModelArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        array: np.ndarray[Any, np.dtype[np.float32]] = rows
        return array
