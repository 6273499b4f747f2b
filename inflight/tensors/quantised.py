"""Weights as integers: the form that quantised checkpoints are read into and that the CPU engine packs.

    w[n, k] = scales[n, k // group] * codes[n, k] - offsets[n, k // group]

Codes are unsigned. Without offsets the scheme is symmetric: the code 2 ** (bits - 1) stands for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.tensors.floats import Floats, widened

Codes = np.ndarray[Any, np.dtype[np.uint8]]
Scales = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Quantised:
    """One weight [n, k].

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; the last group of a row may be shorter.
        codes: uint8 [n, k], each below 2 ** bits.
        scales: float32 [n, ceil(k / group)].
        offsets: float32 [n, ceil(k / group)], subtracted from scale times code (scale times zero point); None:
            symmetric.
    """

    bits: int
    group: int
    codes: Codes
    scales: Scales
    offsets: Scales | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 1 or self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise ValueError(f"no weight of {self.bits} bits in groups of {self.group}")
        wanted = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        for array in (self.scales, self.offsets):
            if array is not None and (array.shape != wanted or array.dtype != np.float32):
                raise ValueError(f"scales {list(array.shape)} {array.dtype} do not fit codes {list(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantise(self) -> Scales:
        """The weight float32 [n, k] that the integers stand for."""
        n, k = self.shape
        wide = np.zeros((n, self.scales.shape[1] * self.group), np.float32)
        wide[:, :k] = self.codes
        groups = wide.reshape(n, -1, self.group)
        if self.offsets is None:
            groups -= 2 ** (self.bits - 1)
            groups *= self.scales[..., None]
        else:
            groups *= self.scales[..., None]
            groups -= self.offsets[..., None]
        return np.ascontiguousarray(wide[:, :k])

    def rows(self, first: int, end: int) -> Quantised:
        """Outputs [first, end)."""
        offsets = None if self.offsets is None else self.offsets[first:end]
        return Quantised(self.bits, self.group, self.codes[first:end], self.scales[first:end], offsets)

    def ordered(self, order: Sequence[int]) -> Quantised:
        """The outputs of these numbers, in this order."""
        index = np.asarray(order)
        offsets = None if self.offsets is None else self.offsets[index]
        return Quantised(self.bits, self.group, self.codes[index], self.scales[index], offsets)


def stack(parts: Sequence[Quantised]) -> Quantised:
    """Weights of the same scheme, one above the other: the outputs of all, the same inputs.

    Raises:
        ValueError: their schemes differ.
    """
    first = parts[0]
    if any((p.bits, p.group, p.offsets is None) != (first.bits, first.group, first.offsets is None) for p in parts):
        raise ValueError("weights of different schemes cannot be one product")
    return Quantised(
        first.bits,
        first.group,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        None if first.offsets is None else np.concatenate([p.offsets for p in parts if p.offsets is not None]),
    )


def quantise(weight: Floats, bits: int, group: int | None = None) -> Quantised:
    """A weight [n, k] rounded to the nearest code, symmetric.

    Args:
        group: inputs that share a scale; None: all of a row.

    The scale maps the largest magnitude of a group to 127 (8 bits) or to the code 0, which is -8 (4 bits: the extreme
    value gets the longer side, as in llama.cpp's Q4_0). Scales of groups are rounded to float16, as they are kept.
    """
    n, k = weight.shape
    size = k if group is None else group
    padded = -(-k // size) * size
    wide = np.zeros((n, padded), np.float32)
    wide[:, :k] = widened(weight)
    groups = wide.reshape(n, -1, size)
    magnitudes = np.abs(groups)
    if bits == 8:
        scales = magnitudes.max(axis=-1) / np.float32(127)
    else:
        largest = np.take_along_axis(groups, magnitudes.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
        scales = largest / np.float32(-8)
    if group is not None:
        scales = scales.astype(np.float16).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    middle = 2 ** (bits - 1)
    codes = np.clip(np.rint(groups * inverse[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return Quantised(bits, size, np.ascontiguousarray(codes.reshape(n, padded)[:, :k]), scales)
