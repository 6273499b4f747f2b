"""Unpacks integers that checkpoints store in int32 words.

All formats fill a word from its lowest bits. Words are read as bytes, so the machine must be little-endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def unpack(words: np.ndarray[Any, Any], bits: int) -> Codes:
    """Codes uint8 [r, c * 32 / bits] of words int32 [r, c], packed along the last dimension.

    Args:
        bits: 4 or 8.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    return octets if bits == 8 else nibbles(octets)


def nibbles(octets: Codes) -> Codes:
    """Codes uint8 [..., 2 m] of bytes [..., m]: of each the low half, then the high one."""
    codes = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=codes[..., 0])
    np.right_shift(octets, 4, out=codes[..., 1])
    return codes.reshape(*octets.shape[:-1], -1)


def unpack_awq(words: np.ndarray[Any, Any]) -> Codes:
    """Codes uint8 [8 * c, r] of 4 bits, transposed, of words int32 [r, c] in AutoAWQ's GEMM packing.

    The nibbles of a word, the lowest first, are the outputs 0, 2, 4, 6, 1, 3, 5, 7: its bytes hold the outputs 0 and 2,
    4 and 6, 1 and 3, 5 and 7.
    """
    rows, columns = words.shape
    octets = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint8).T).reshape(columns, 4, rows)
    low, high = octets & 15, octets >> 4
    codes = np.empty((columns, 8, rows), np.uint8)
    codes[:, 0::4], codes[:, 2::4] = low[:, :2], high[:, :2]
    codes[:, 1::4], codes[:, 3::4] = low[:, 2:], high[:, 2:]
    unpacked: Codes = codes.reshape(8 * columns, rows)
    return unpacked


def unsigned(codes: np.ndarray[Any, Any]) -> Codes:
    """int8 codes around 0 as uint8 ones around 128."""
    flipped: Codes = codes.view(np.uint8) ^ np.uint8(128)
    return flipped
