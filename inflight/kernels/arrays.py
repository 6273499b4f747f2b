"""Converts between arrays and the addresses that are passed to the native library."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from inflight.kernels.layout import Bytes

CACHE_LINE = 64


def address(data: np.ndarray[Any, Any]) -> int:
    """The address of a contiguous array's first byte."""
    return int(data.__array_interface__["data"][0])


def view(first: int, size: int) -> Bytes:
    """The bytes at an address, which must outlive the view."""
    if not size:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(first))


def aligned_floats(rows: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Memory for float32 [rows, width] that begins at a cache line."""
    raw = np.empty(rows * width * 4 + CACHE_LINE, np.uint8)
    begin = -address(raw) % CACHE_LINE
    return raw[begin : begin + rows * width * 4].view(np.float32).reshape(rows, width)
