"""Loads a decoder's weights into a native program, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from inflight.checkpoint import Weights, floats_into
from inflight.kernels import BLOCK_TYPES, NativeProgram, Precision, Table
from inflight.models.decoder_tensors import DecoderTensors
from inflight.models.pieces import Piece
from inflight.models.weight_cache import CacheWriter, PackedProduct
from inflight.tensors import BFLOAT16, Blocks, Floats, Quantised, Weight, stack, widened

TABLE_TYPES = {np.dtype(np.float32): "F32", BFLOAT16: "BF16", np.dtype(np.float16): "F16"}
"""Types of `Table` by the dtypes of floats."""


class WeightLoader(Protocol):
    """Adds a decoder's weights to a program by their names (see `inflight.models.decoder_tensors`), each once."""

    def product(
        self, program: NativeProgram, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        """Adds a weight and its bias to the program; returns the product's number.

        A weight whose tensors have several formats becomes several products, whose outputs lie side by side. None of
        them is gated then: the two halves of a gated weight are products of their own.
        """

    def norm(self, program: NativeProgram, name: str) -> int:
        """Adds a norm's weight; returns its number."""

    def array(self, program: NativeProgram, name: str) -> int:
        """Adds a small array as float32, as the program wants it; returns its number."""

    def table(self, program: NativeProgram, name: str) -> int:
        """Adds a table whose rows tokens read, where it lies in the file; returns its number."""

    def finish(self, program: NativeProgram) -> None:
        """Is called once, after all weights were added."""


class CheckpointLoader:
    """Packs the weights of a checkpoint. Each is read, packed and released before the next is read.

    Args:
        tensors: which tensors of the checkpoint a weight consists of.
        dtype: of weights that are floats, and of those whose format the engine does not have.
        cache: the file to which the packed weights are written at the end (`CacheWriter`); None: none is written.
    """

    def __init__(
        self, tensors: DecoderTensors, weights: Weights, dtype: np.dtype[Any], cache: Path | None = None
    ) -> None:
        self._tensors = tensors
        self._weights = weights
        self._dtype = dtype
        self._cache = cache
        self._products: dict[str, list[PackedProduct]] = {}
        self._norms: dict[str, Floats] = {}
        self._tables: dict[str, Table] = {}

    def product(
        self, program: NativeProgram, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        product = self._tensors.product(name)
        for piece in product.weights:
            piece.check(self._weights)  # a wrong config must not reserve memory
        weights = self._by_format(product.weights, several=name.count(".") < 2)
        bias = self._floats(product.biases) if product.biases else None
        products: list[PackedProduct] = []
        first = 0
        for weight in weights:
            outputs = sum(blocks.shape[0] for blocks in weight) if isinstance(weight, list) else weight.shape[0]
            own_bias = None if bias is None else bias[first : first + outputs]
            number = program.product(weight, own_bias, precision, gated=gated and len(weights) == 1)
            products.append(PackedProduct(number, own_bias))
            first += outputs
        self._products[name] = products
        self._weights.release()
        return tuple(product.number for product in products)

    def norm(self, program: NativeProgram, name: str) -> int:
        self._norms[name] = self._floats((self._tensors.norm(name),))
        self._weights.release()
        return program.weight(self._norms[name])

    def array(self, program: NativeProgram, name: str) -> int:
        piece = self._tensors.array(name)
        self._weights.check(piece.name, piece.shape)
        stored = self._weights.read(piece.name, piece.shape)
        values = np.array(widened(stored if isinstance(stored, np.ndarray) else stored.dequantise()), np.float32)
        factors = self._tensors.factors(name)
        if factors is not None:
            values = values * factors.reshape(-1, *(1,) * (values.ndim - 1))
        if name.endswith(".conv"):
            values = np.ascontiguousarray(values.reshape(piece.shape[0], -1).T)
        if name.endswith(".decay"):
            values = -np.exp(values)
        if name.endswith((".squares", ".exponentials")):
            values = np.logaddexp(np.float32(0), values)  # stored in front of a softplus
        if name.endswith(".router_scale"):
            values = values * np.float32(values.size**-0.5)
        self._norms[name] = values.reshape(-1)
        self._weights.release()
        return program.weight(self._norms[name])

    def table(self, program: NativeProgram, name: str) -> int:
        [piece] = self._tensors.product(name).weights
        piece.check(self._weights)
        stored = piece.read(self._weights)
        if isinstance(stored, Blocks) and stored.type in BLOCK_TYPES:
            type, data = stored.type, stored.data
        else:
            if not isinstance(stored, np.ndarray):  # no kernel has its format: floats, in memory
                stored = self._stacked_floats([piece], [stored])
            type, data = TABLE_TYPES[stored.dtype], stored.view(np.uint8)
        rows, columns = piece.shape
        self._tables[name] = Table(type, rows, columns, np.ascontiguousarray(data).reshape(-1))
        self._weights.release()
        return program.table(self._tables[name])

    def _by_format(self, pieces: Sequence[Piece], several: bool) -> list[Floats | Quantised | list[Blocks]]:
        """Reads tensors and stacks neighbours of one format.

        Args:
            several: the result may have several formats; if not, tensors of several formats become floats.
        """
        tensors = [piece.read(self._weights) for piece in pieces]
        runs = [list(run) for _, run in groupby(range(len(tensors)), key=lambda index: _format(tensors[index]))]
        if len(runs) > 1 and not several:
            return [self._stacked_floats(pieces, tensors)]
        return [self._stacked([pieces[index] for index in run], [tensors[index] for index in run]) for run in runs]

    def _stacked(self, pieces: Sequence[Piece], tensors: Sequence[Weight]) -> Floats | Quantised | list[Blocks]:
        """Stacks tensors of one format."""
        blocks = [tensor for tensor in tensors if isinstance(tensor, Blocks) and tensor.type in BLOCK_TYPES]
        codes = [tensor for tensor in tensors if isinstance(tensor, Quantised)]
        if blocks:
            return blocks
        if codes:
            return codes[0] if len(codes) == 1 else stack(codes)
        [first, *others] = tensors
        if not others and isinstance(first, np.ndarray) and first.dtype == self._dtype:
            return first
        return self._stacked_floats(pieces, tensors)

    def _floats(self, pieces: Sequence[Piece]) -> Floats:
        for piece in pieces:
            piece.check(self._weights)
        tensors = [piece.read(self._weights) for piece in pieces]
        return self._stacked_floats(pieces, tensors)

    def _stacked_floats(self, pieces: Sequence[Piece], tensors: Sequence[Weight]) -> Floats:
        """Stacks tensors of any formats, as floats."""
        sizes = [piece.size for piece in pieces]
        floats = np.empty((sum(size[0] for size in sizes), *sizes[0][1:]), self._dtype)
        begin = 0
        for tensor, size in zip(tensors, sizes):
            floats_into(tensor, floats[begin : begin + size[0]])
            begin += size[0]
        return floats

    def finish(self, program: NativeProgram) -> None:
        if self._cache is not None:
            CacheWriter(self._cache, program, self._products, self._norms, self._tables)


def _format(weight: Weight) -> tuple[Any, ...]:
    """A key that is equal for weights that one product can hold."""
    if isinstance(weight, Quantised):
        return weight.bits, weight.group, weight.offsets is None
    return (weight.type,) if isinstance(weight, Blocks) and weight.type in BLOCK_TYPES else ()
