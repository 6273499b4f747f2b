"""Adapters of low rank on the CPU engine: what one adds to products, laid out as `csrc/lora.h` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.kernels.arrays import CACHE_LINE, address
from inflight.kernels.layout import Bytes
from inflight.tensors import BFLOAT16, Floats

LANES, PANEL = 16, 64
"""Inputs that the depth of a first factor is rounded to; outputs of a panel of a second factor."""


@dataclass(frozen=True)
class LowRankPart:
    """Some outputs of a module.

    Attributes:
        second: [n, rank].
        column: of the product's outputs, where these begin.
    """

    second: Floats
    column: int


@dataclass(frozen=True)
class LowRankModule:
    """What an adapter adds to a module within a product: scale * second (first x).

    Attributes:
        first: [rank, k].
        parts: of its outputs.
    """

    first: Floats
    scale: float
    parts: Sequence[LowRankPart]


class PackedAdapter:
    """The factors of one adapter in the native library's order, and what its calls take.

    Args:
        modules: by the number of the operation.
        half: outputs of the first half, of operations whose product is gated.
        dtype: of the packed factors, bfloat16 or float32.

    Attributes:
        bytes: of the memory.
    """

    def __init__(
        self, modules: Mapping[int, Sequence[LowRankModule]], half: Mapping[int, int], dtype: np.dtype[Any]
    ) -> None:
        if dtype not in (BFLOAT16, np.dtype(np.float32)):
            raise ValueError(f"factors are bfloat16 or float32, not {dtype}")
        self.floats = dtype != BFLOAT16
        arrays: list[Floats] = []
        self._firsts: list[tuple[int, ...]] = []
        self._seconds: list[tuple[Any, ...]] = []
        for operation, own in modules.items():
            ranks = [len(module.first) for module in own]
            k = own[0].first.shape[1]
            stacked = np.zeros((sum(ranks), -(-k // LANES) * LANES), dtype)
            np.concatenate([module.first for module in own], out=stacked[:, :k], casting="unsafe")
            self._firsts.append((operation, len(arrays), len(stacked), k, stacked.shape[1]))
            arrays.append(stacked)
            for module, rank, hidden in zip(own, ranks, np.cumsum([0, *ranks]).tolist()):
                for part in _halves(module.parts, half.get(operation)):
                    n = len(part.second)
                    self._seconds.append(
                        (operation, len(arrays), rank, hidden, n, part.column, part.half, float(module.scale))
                    )
                    arrays.append(_panels(part.second, dtype))
        self._memory, self._at = _side_by_side(arrays)
        self.bytes = self._memory.nbytes

    @property
    def arguments(self) -> tuple[list[tuple[int, ...]], list[tuple[Any, ...]]]:
        """First and second factors, with addresses in memory that this object keeps."""
        return (
            [(operation, self._at[array], *rest) for operation, array, *rest in self._firsts],
            [(operation, self._at[array], *rest) for operation, array, *rest in self._seconds],
        )


@dataclass(frozen=True)
class _HalfPart:
    """A part whose column counts from the beginning of its half; half -1: of a product without halves."""

    second: Floats
    column: int
    half: int


def _halves(parts: Sequence[LowRankPart], half: int | None) -> list[_HalfPart]:
    if half is None:
        return [_HalfPart(part.second, part.column, -1) for part in parts]
    found = []
    for part in parts:
        for number in (0, 1):
            first = max(part.column, number * half)
            end = min(part.column + len(part.second), (number + 1) * half)
            if first < end:
                rows = part.second[first - part.column : end - part.column]
                found.append(_HalfPart(rows, first - number * half, number))
    return found


def _panels(second: Floats, dtype: np.dtype[Any]) -> Floats:
    """[n, rank] as panels [rank, 64 outputs]."""
    n, rank = second.shape
    panels: Floats = np.zeros((-(-n // PANEL), PANEL, rank), dtype)
    panels.reshape(-1, rank)[:n] = second
    return np.ascontiguousarray(panels.transpose(0, 2, 1))


def _side_by_side(arrays: Sequence[Floats]) -> tuple[Bytes, list[int]]:
    """Memory that holds the arrays, each from a cache line on, and their addresses."""
    sizes = [-(-array.nbytes // CACHE_LINE) * CACHE_LINE for array in arrays]
    memory = np.empty(sum(sizes) + CACHE_LINE, np.uint8)
    begin, addresses = -address(memory) % CACHE_LINE, []
    for array, size in zip(arrays, sizes):
        memory[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        addresses.append(address(memory) + begin)
        begin += size
    return memory, addresses
