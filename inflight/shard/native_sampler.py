"""Sampling from numpy's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inflight.models import Rows
from inflight.plan import Sampling
from inflight.shard.sampling import RowState, Sampled, Sampler
from inflight.types import Array


class NativeSampler(Sampler):
    """Rows that take their likeliest token and want nothing else need no more than the model found."""

    def sample(
        self,
        logits: Rows,
        sampling: Sequence[Sampling],
        state: Callable[[int], RowState],
        masks: Mapping[int, bytes] | None = None,
        best: Array | None = None,
    ) -> Sampled:
        if best is not None and not masks and all(each.greedy for each in sampling):
            return Sampled(best.copy(), None, [[] for _ in sampling])
        from inflight.shard.sampler import TorchSampler

        return TorchSampler().sample(_tensor(logits), sampling, state, masks, best)

    def prompt_logprobs(self, logits: Rows, following: Array) -> list[float]:
        from inflight.shard.sampler import TorchSampler

        return TorchSampler().prompt_logprobs(_tensor(logits), following)

    def on_host(self, rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
        found: np.ndarray[Any, np.dtype[np.float32]] = rows
        return found


def _tensor(logits: Rows) -> Any:
    import torch

    return torch.from_numpy(logits)
