"""Tensors of a checkpoint, or slices of them, and the weights that are stacked from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inflight.checkpoint import Slice, Weights
from inflight.errors import StartError
from inflight.tensors import Weight, ordered


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, or a slice of it.

    Attributes:
        shape: of the whole tensor, as the config wants it.
        part: None: the whole tensor.
        expert: its number and that of all experts, where the tensor [experts, *shape] holds those of a layer.
        order: the slice's rows in the order in which they are wanted; empty: as they are.
        transposed: rows and columns of the slice are exchanged, of quantised ones as floats.
    """

    name: str
    shape: tuple[int, ...]
    part: Slice | None = None
    expert: tuple[int, int] | None = None
    order: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of what is read."""
        size = self.shape
        if self.part is not None:
            dim, first, end = self.part
            size = (*size[:dim], end - first, *size[dim + 1 :])
        return size[::-1] if self.transposed else size

    def check(self, weights: Weights) -> None:
        """Raises StartError if the tensor is missing or has another shape."""
        weights.check(self.name, self.shape if self.expert is None else (self.expert[1], *self.shape))

    def read(self, weights: Weights) -> Weight:
        """The slice, as it is stored.

        Raises:
            StartError: it is missing, broken, of another shape or in a form that is not read.
        """
        if self.expert is None:
            read = weights.read(self.name, self.shape, self.part)
            if self.transposed:
                floats = read if isinstance(read, np.ndarray) else read.dequantise()
                return np.ascontiguousarray(floats.T)
            return ordered(read, self.order) if self.order else read
        number, count = self.expert
        stacked = weights.read(self.name, (count, *self.shape), Slice(0, number, number + 1))
        if not isinstance(stacked, np.ndarray):
            raise StartError(f"tensor '{self.name}' holds quantised experts in one, which are not read")
        own: np.ndarray = stacked[0]
        if self.part is None:
            return own
        index = [slice(None)] * own.ndim
        index[self.part.dim] = slice(self.part.first, self.part.end)
        return own[tuple(index)]


@dataclass(frozen=True)
class Product:
    """y = x Wᵀ + b: the tensors that are stacked in W and in b; b is empty without biases."""

    weights: tuple[Piece, ...]
    biases: tuple[Piece, ...] = ()


def by_head(name: str, hidden: int | None, heads: int, sizes: Sequence[int]) -> tuple[Piece, ...]:
    """The parts of a tensor whose rows are grouped by head: the first part of every head, then the second, ...

    Args:
        hidden: inputs; None: of a bias.
        sizes: rows of each part of a head.
    """
    step = sum(sizes)
    shape = (heads * step,) if hidden is None else (heads * step, hidden)
    firsts = [sum(sizes[:part]) for part in range(len(sizes))]
    return tuple(
        Piece(name, shape, Slice(0, head * step + first, head * step + first + size))
        for first, size in zip(firsts, sizes)
        for head in range(heads)
    )
