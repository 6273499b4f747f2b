"""Memory-mapped files whose pages are released after use."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
AHEAD = 1 << 25
"""Bytes behind those that are needed soon which the system reads too, while these are used: files list tensors in about
the order in which a model takes them."""


class MappedFile:
    """Bytes of a file, read-only.

    Pages that were read count as memory of the process until they are released. Releasing is always safe: the next
    access reads the page from the file again.

    Raises:
        OSError, ValueError: it cannot be mapped; an empty file cannot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)

    def view(self, start: int, size: int) -> Bytes:
        """A view of the bytes [start, start + size)."""
        return np.frombuffer(self._map, np.uint8, size, start) if size else np.empty(0, np.uint8)

    def taken(self, start: int, size: int) -> bytes:
        """A copy of a few bytes."""
        return self._map[start : start + size]

    @property
    def buffer(self) -> mmap.mmap:
        return self._map

    def expect(self, start: int, size: int) -> None:
        """Advises the system that these bytes are needed soon, so that it reads them, and `AHEAD`, in large pieces."""
        self._advise("MADV_WILLNEED", start, size + AHEAD)

    def release(self, start: int, size: int) -> None:
        """Advises the system that these bytes are not needed now."""
        self._advise("MADV_DONTNEED", start, size)

    def _advise(self, name: str, start: int, size: int) -> None:
        option = getattr(mmap, name, None)
        if option is None or not sys.platform.startswith("linux"):
            return  # on other systems the advice has another meaning
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(start + size, self.size) - first
        if length > 0:
            self._map.madvise(option, first, length)
