"""Blocks of llama.cpp's quantisations as they lie in GGUF files, and the floats that they stand for.

Layouts: ggml-common.h of ggml-org/llama.cpp; the arithmetic: dequantize_row_* in its ggml-quants.c, in float32. All
numbers in a block are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Octets = np.ndarray[Any, np.dtype[np.uint8]]
Values = np.ndarray[Any, np.dtype[np.float32]]

_AT_ONCE = 1 << 22  # values that are decoded at a time: temporaries stay small beside the result


class BlockForm(NamedTuple):
    """One type: a block of so many bytes holds so many values; `decode`: uint8 [blocks, bytes] to float32 [blocks,
    values]."""

    values: int
    bytes: int
    decode: Callable[[Octets], Values]


@dataclass(frozen=True)
class Blocks:
    """One weight [n, k], each row a run of blocks.

    Attributes:
        type: ggml's name of it, one of `BLOCKS`.
        shape: (n, k).
        data: uint8 [n, bytes of a row]; may be a read-only view of a mapped file.

    Raises:
        ValueError: the type is not known, or bytes and shape do not fit together.
    """

    type: str
    shape: tuple[int, int]
    data: Octets

    def __post_init__(self) -> None:
        form = BLOCKS.get(self.type)
        if form is None:
            raise ValueError(f"blocks of type '{self.type}' are not known; known are {', '.join(BLOCKS)}")
        n, k = self.shape
        if k % form.values:
            raise ValueError(f"rows of {k} values do not divide into {self.type}'s blocks of {form.values}")
        wanted = (n, k // form.values * form.bytes)
        if self.data.shape != wanted or self.data.dtype != np.uint8:
            raise ValueError(f"{self.data.dtype} {list(self.data.shape)} is no {self.type} weight {[n, k]}")

    @property
    def form(self) -> BlockForm:
        return BLOCKS[self.type]

    def rows(self, first: int, end: int) -> Blocks:
        """Outputs [first, end), the same bytes."""
        data = self.data[first:end]
        return Blocks(self.type, (len(data), self.shape[1]), data)

    def ordered(self, order: Sequence[int]) -> Blocks:
        """The outputs of these numbers, in this order."""
        return Blocks(self.type, (len(order), self.shape[1]), self.data[np.asarray(order)])

    def dequantise(self) -> Values:
        """The weight float32 [n, k]."""
        n, k = self.shape
        result = np.empty((n, k), np.float32)
        step = max(1, _AT_ONCE // max(k, 1))
        for first in range(0, n, step):
            blocks = np.ascontiguousarray(self.data[first : first + step]).reshape(-1, self.form.bytes)
            result[first : first + step] = self.form.decode(blocks).reshape(-1, k)
        return result


def _half(blocks: Octets, at: int) -> Values:
    """float16 at a byte of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(octets: Octets) -> Octets:
    """[..., m] -> [..., 2 m]: all low nibbles, then all high ones."""
    return np.concatenate([octets & 15, octets >> 4], axis=-1)


def _bits(octets: Octets) -> Octets:
    """[blocks, m] -> [blocks, 8 m] of 0 or 1, the lowest bit of a byte first."""
    return np.unpackbits(octets, axis=-1, bitorder="little")


def _flat(values: np.ndarray[Any, np.dtype[Any]], blocks: Octets) -> Values:
    return values.reshape(len(blocks), -1).astype(np.float32, copy=False)


def _q8_0(blocks: Octets) -> Values:
    """32 values: a scale, int8 codes."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Octets) -> Values:
    """32 values: a scale, 16 bytes with the first half in the low nibbles and the second one in the high ones."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Octets) -> Values:
    """As Q4_0, with a minimum in place of the middle."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Octets) -> Values:
    """As Q4_0, with the fifth bits of all values in 4 bytes before the nibbles."""
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Octets) -> Values:
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _pairs(octets: Octets) -> Octets:
    """[blocks, 64] -> [blocks, 256]: of 32 bytes the lowest pairs of bits first, then the next ones."""
    pairs = octets.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    flat: Octets = (pairs & np.uint8(3)).reshape(-1, 256)
    return flat


def _q2_k(blocks: Octets) -> Values:
    """256 values in 16 groups: 16 bytes of scales (low nibbles) and minima, codes of 2 bits, d and dmin."""
    scales = _half(blocks, 80) * (blocks[:, :16] & 15)
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4)
    codes = _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    return _flat(scales[..., None] * codes - minima[..., None], blocks)


def _q3_k(blocks: Octets) -> Values:
    """256 values in 16 groups: third bits (one byte for 8 groups of 32), codes of 2 bits, scales of 6 bits, d."""
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8])
    high = ((packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3).reshape(-1, 16)
    scales = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    third = ((blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(-1, 256)
    codes = (_pairs(blocks[:, 32:96]) | third << 2).astype(np.float32) - 4
    return _flat(scales[..., None] * codes.reshape(-1, 16, 16), blocks)


def _scales_of_k(blocks: Octets) -> tuple[Values, Values]:
    """Scales and minima [blocks, 8] of Q4_K and Q5_K, 6 bits each in 12 bytes after d and dmin."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: Octets) -> Values:
    """256 values in 8 groups: w = d * scale * code - dmin * minimum."""
    scales, minima = _scales_of_k(blocks)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _flat(scales[..., None] * codes - minima[..., None], blocks)


def _q5_k(blocks: Octets) -> Values:
    """As Q4_K, with the fifth bits in 32 bytes before the nibbles: bit g of byte i belongs to value i of group g."""
    scales, minima = _scales_of_k(blocks)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return _flat(scales[..., None] * codes - minima[..., None], blocks)


def _q6_k(blocks: Octets) -> Values:
    """256 values in 16 groups: nibbles, upper pairs of bits, scales of 8 bits, d."""
    # Each half of a block: 64 bytes of nibbles, low ones first, and 32 bytes with the pairs of 4 times 32 values.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    codes = (low | _pairs(blocks[:, 128:192]) << 4).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return _flat(scales[..., None] * codes.reshape(-1, 16, 16), blocks)


_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of 4-bit floats (E2M1)."""


def _iq4_nl(blocks: Octets) -> Values:
    """As Q4_0, with codes that stand for the values of a table."""
    return _half(blocks, 0) * _NONLINEAR[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Octets) -> Values:
    """256 values in 8 groups: d, scales of 6 bits (upper pairs in 2 bytes, nibbles in 4), IQ4_NL's codes."""
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    lower = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    scales = _half(blocks, 0) * ((lower | upper << 4).astype(np.float32) - 32)
    values = _NONLINEAR[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    return _flat(scales[..., None] * values, blocks)


def _mxfp4(blocks: Octets) -> Values:
    """32 values: an exponent (E8M0), 4-bit floats."""
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return _flat(scale * _FP4[_nibbles(blocks[:, 1:])], blocks)


BLOCKS: dict[str, BlockForm] = {
    "Q4_0": BlockForm(32, 18, _q4_0),
    "Q4_1": BlockForm(32, 20, _q4_1),
    "Q5_0": BlockForm(32, 22, _q5_0),
    "Q5_1": BlockForm(32, 24, _q5_1),
    "Q8_0": BlockForm(32, 34, _q8_0),
    "Q2_K": BlockForm(256, 84, _q2_k),
    "Q3_K": BlockForm(256, 110, _q3_k),
    "Q4_K": BlockForm(256, 144, _q4_k),
    "Q5_K": BlockForm(256, 176, _q5_k),
    "Q6_K": BlockForm(256, 210, _q6_k),
    "IQ4_NL": BlockForm(32, 18, _iq4_nl),
    "IQ4_XS": BlockForm(256, 136, _iq4_xs),
    "MXFP4": BlockForm(32, 17, _mxfp4),
}
"""By ggml's names."""
