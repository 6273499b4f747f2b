"""LoRA adapters on torch's operators, several in one batch.

Every product of the decoder that an adapter may change holds a `LowRank`. A step says which tokens belong to which
adapter, and only those get its update. Ranks split updates as they split the weights: the second factor by rows if the
weight is split by rows, the first by columns if it is split by columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from inflight.models.adapter import Adapter, ModuleSlice
from inflight.nn import to_tensor


@dataclass
class AdapterTokens:
    """The tokens of each adapter in the running step: (the adapter's number, int64 [n] indices)."""

    current: list[tuple[int, torch.Tensor]] = field(default_factory=list)


LowFactors: TypeAlias = "tuple[torch.Tensor, torch.Tensor, int]"
"""The first factor, the scaled second one, and the column of the product where its outputs begin."""


class LowRank:
    """The updates of one product: those of every adapter to every module in it."""

    def __init__(self, adapter_tokens: AdapterTokens, slices: list[ModuleSlice], like: torch.Tensor) -> None:
        self._adapter_tokens = adapter_tokens
        self._module_slices = slices
        self._dtype, self._device = like.dtype, like.device
        self._factors: dict[int, list[LowFactors]] = {}

    def read(self, adapter: Adapter, head_dim: int) -> list[LowFactors]:
        """This rank's share of one adapter's factors."""
        found: list[LowFactors] = []
        for part in self._module_slices:
            factors = adapter.factors(part, head_dim)
            if factors is None:
                continue
            first, second = to_tensor(factors.first), to_tensor(factors.second) * factors.scale
            found.append((first.to(self._device, self._dtype), second.to(self._device, self._dtype), part.offset))
        return found

    def set(self, number: int, factors: list[LowFactors]) -> None:
        """Makes an adapter known; without factors it changes nothing."""
        self._factors.pop(number, None)
        if factors:
            self._factors[number] = factors

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds every token's update. Args: x [T, in], y [T, out], changed in place."""
        for number, index in self._adapter_tokens.current:
            inputs = x[index]
            for first, second, at in self._factors.get(number, ()):
                end = at + second.shape[0]
                y[index, at:end] += (inputs @ first.T) @ second.T
