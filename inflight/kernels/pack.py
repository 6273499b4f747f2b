"""Packs weights into the native library's panels (`csrc/types.h`), or takes them packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.kernels.arrays import address, view
from inflight.kernels.layout import MAX_GROUP, MAX_INPUTS, Packed, PackedBytes, Precision
from inflight.kernels.library import Format, Source, native
from inflight.tensors import BFLOAT16, Blocks, Floats, Quantised, Weight, widened

SOURCES = {np.dtype(np.float32): "FLOAT", BFLOAT16: "BF16", np.dtype(np.float16): "HALF"}
"""Names in `Source` of the floats that can be packed."""


class Packer:
    """The weights of one native program.

    Attributes:
        shapes: of the products, by number.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self.shapes: list[Packed] = []
        self._mapped: list[PackedBytes] = []  # the program reads their memory

    def pack(
        self, weight: Weight | Sequence[Blocks], bias: Floats | None, precision: Precision | None, *, gated: bool
    ) -> int:
        """See `NativeProgram.product`."""
        if isinstance(weight, Blocks):
            weight = [weight]
        n, k = _stacked(weight) if isinstance(weight, Sequence) else weight.shape
        added = None if bias is None else widened(bias)
        if added is not None and added.shape != (n,):
            raise ValueError(f"a bias of {list(added.shape)} does not fit a weight of {[n, k]}")
        bias_at = 0 if added is None else address(added)
        if isinstance(weight, Sequence):
            return self._blocks(weight, (n, k), bias_at, gated)
        if isinstance(weight, Quantised) and not _packable(weight):
            weight = weight.dequantise().astype(BFLOAT16)
        if isinstance(weight, Quantised):
            return self._codes(weight, bias_at, gated)
        return self._floats(weight, precision, bias_at, gated)

    def packed(self, product: int) -> PackedBytes:
        """See `NativeProgram.packed`."""
        data, size, scales, scales_size = self._program.packed(product)
        return PackedBytes(self.shapes[product], view(data, size), view(scales, scales_size))

    def add_packed(self, packed: PackedBytes, bias: Floats | None) -> int:
        """See `NativeProgram.product_of`."""
        shape = packed.shape
        size = native.packed_bytes(shape.format, shape.offsets, shape.gated, shape.n, shape.k, shape.group)
        panels = -(-shape.n // 2 // 16) if shape.gated else -(-shape.n // 32)
        scales = panels * 32 * 4 if shape.format == Format.INT8 else 0
        if len(packed.data) != size or len(packed.scales) != scales or (bias is not None and bias.size != shape.n):
            raise ValueError(f"{len(packed.data)} bytes are no packed weight {shape}")
        added = None if bias is None else widened(bias)
        self._mapped.append(packed)
        number = self._program.add_packed(
            address(packed.data),
            address(packed.scales) if len(packed.scales) else 0,
            0 if added is None else address(added),
            shape.format,
            shape.offsets,
            shape.gated,
            shape.n,
            shape.k,
            shape.group,
        )
        return self._added(number, shape)

    def _floats(self, weight: Floats, precision: Precision | None, bias: int, gated: bool) -> int:
        if weight.dtype not in SOURCES:
            raise ValueError(f"a weight must be float32, bfloat16 or float16, not {weight.dtype}")
        if precision is None:
            precision = Precision(Format.FLOAT if weight.dtype == np.float32 else Format.BF16)
        n, k = weight.shape
        contiguous = np.ascontiguousarray(weight)
        number = self._program.add_floats(
            address(contiguous), Source[SOURCES[weight.dtype]], bias, precision.format, gated, n, k, precision.group
        )
        return self._added(number, Packed(precision.format, False, gated, n, k, precision.group))

    def _blocks(self, tensors: Sequence[Blocks], shape: tuple[int, int], bias: int, gated: bool) -> int:
        form = Format[tensors[0].type]
        arrays = [np.ascontiguousarray(tensor.data) for tensor in tensors]
        rows = [(address(data), len(data)) for data in arrays]
        number = self._program.add_blocks(rows, bias, form, gated, *shape)
        return self._added(number, Packed(form, False, gated, *shape, 0))

    def _codes(self, weight: Quantised, bias: int, gated: bool) -> int:
        n, k = weight.shape
        by_output = weight.bits == 8 and weight.group >= k and weight.offsets is None and k <= MAX_INPUTS
        form = Format.INT8 if by_output else Format.GROUP8 if weight.bits == 8 else Format.GROUP4
        group = 0 if by_output else -(-k // 8) * 8 if weight.group >= k else weight.group
        codes, scales = np.ascontiguousarray(weight.codes), np.ascontiguousarray(weight.scales)
        offsets = None if weight.offsets is None else np.ascontiguousarray(weight.offsets)
        offsets_at = 0 if offsets is None else address(offsets)
        number = self._program.add_codes(address(codes), address(scales), offsets_at, bias, form, gated, n, k, group)
        return self._added(number, Packed(form, offsets is not None, gated, n, k, group))

    def _added(self, number: int, shape: Packed) -> int:
        self.shapes.append(shape)
        return int(number)


def _packable(weight: Quantised) -> bool:
    """Whether a packed format can hold it: groups of whole steps whose sums fit 32 bits."""
    k = weight.shape[1]
    if weight.group < k:
        return weight.group % 8 == 0 and weight.group <= MAX_GROUP
    return k <= MAX_GROUP or (weight.bits == 8 and weight.offsets is None and k <= MAX_INPUTS)


def _stacked(tensors: Sequence[Blocks]) -> tuple[int, int]:
    """The shape of tensors that are stacked along their outputs."""
    if len({(tensor.type, tensor.shape[1]) for tensor in tensors}) != 1:
        raise ValueError("blocks of one weight have one type and as many inputs")
    return sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
