"""Large arrays between the server and its workers, without copying them through a socket.

An `Arena` is a sparse anonymous file, mapped once at its full size and passed to worker processes as an open file
descriptor: it has no name in any file system, so nothing is left behind, however a process ends. One process allocates
in an arena and keeps its books; the other maps it read-only and receives offsets.

A block lives as long as the memoryview that `allocate` returned, or any object that refers to it (an array over it, a
transport that has yet to send it).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np

from inflight.contract import Array

LARGE = 64 * 1024
"""Values of this many bytes or more travel through an arena. Below, a copy through the socket is cheaper."""

PAGE = mmap.PAGESIZE
KEEP_WARM = 256 * 1024 * 1024
"""Free memory kept for the next block, in bytes; more is given back to the system at once."""


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def create_file(name: str, size: int) -> int:
    """An anonymous sparse file of `size` bytes; pages cost memory only once they are written."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix=name)
        os.unlink(path)
    os.ftruncate(fd, size)
    return fd


def address_of(buffer: memoryview | mmap.mmap) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


class Arena:
    """The allocating side: first fit over a list of free ranges.

    Args:
        fd: a file made by `create_file`; the arena takes it over.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        try:
            self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED)
        except OSError:
            os.close(fd)
            raise
        self._base = address_of(self._map)
        self._starts = [0]
        self._free: dict[int, int] = {0: self.size}
        self._used: dict[int, int] = {}
        self._dirty_free = 0  # bytes of free ranges that may still hold pages
        self._high = 0  # everything at or above was never touched

    @property
    def in_use(self) -> int:
        """Bytes of blocks that are alive."""
        return sum(self._used.values())

    def take(self, nbytes: int) -> int | None:
        """Allocates; returns the offset of a page-aligned block, or None when there is no room."""
        if self._map.closed:
            return None
        need = max(PAGE, -(-nbytes // PAGE) * PAGE)
        for position, start in enumerate(self._starts):
            room = self._free[start]
            if room >= need:
                del self._starts[position]
                del self._free[start]
                if room > need:
                    insort(self._starts, start + need)
                    self._free[start + need] = room - need
                self._used[start] = need
                self._dirty_free -= max(0, min(start + need, self._high) - start)
                self._high = max(self._high, start + need)
                return start
        return None

    def free(self, offset: int) -> None:
        """Gives a block back and joins it with its free neighbours. Unknown offsets are ignored."""
        length = self._used.pop(offset, None)
        if length is None:
            return
        if self._map.closed:
            return
        if self._dirty_free + length > KEEP_WARM and hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, offset, length)
        else:
            self._dirty_free += length
        position = bisect_left(self._starts, offset)
        if position < len(self._starts) and offset + length == self._starts[position]:
            length += self._free.pop(self._starts.pop(position))
        if position > 0:
            before = self._starts[position - 1]
            if before + self._free[before] == offset:
                self._free[before] += length
                return
        self._starts.insert(position, offset)
        self._free[offset] = length

    def allocate(self, nbytes: int) -> memoryview | None:
        """A writable block of `nbytes` bytes that is freed when nothing refers to it any more."""
        offset = self.take(nbytes)
        if offset is None:
            return None
        # An array owns the block: arrays made over it keep it alive, whereas a memoryview's slice would not.
        owner: Array = np.ndarray(nbytes, np.uint8, self._map, offset)
        weakref.finalize(owner, self.free, offset).atexit = False
        return owner.data

    def offset_of(self, array: Array) -> int | None:
        """The offset of a C-contiguous array in this arena, or None if it lies elsewhere."""
        offset = int(array.__array_interface__["data"][0]) - self._base
        return offset if 0 <= offset < self.size and array.flags.c_contiguous else None

    def write(self, offset: int, array: Array) -> None:
        """Copies a C-contiguous array's bytes into the block at `offset`."""
        target = np.frombuffer(self._map, np.uint8, array.nbytes, offset)
        target[:] = array.reshape(-1).view(np.uint8)

    def place(self, array: Array) -> Array | None:
        """A copy of the array in the arena, read-only; None when there is no room."""
        block = self.allocate(array.nbytes)
        if block is None:
            return None
        copy: Array = np.frombuffer(block, array.dtype).reshape(array.shape)
        copy[...] = array
        copy.flags.writeable = False
        return copy

    def close(self) -> None:
        """Closes the file; blocks that are still referred to stay readable."""
        os.close(self.fd)
        _unmap(self._map)


class ArenaReader:
    """The reading side: read-only memory of the blocks that the other process names by offsets.

    Args:
        fd: the same file, opened by inheritance.
        on_release: called with a block's offset once its memory is no longer referred to.
    """

    def __init__(self, fd: int, on_release: Callable[[int], None] | None = None) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._on_release = on_release

    def view(self, offset: int, nbytes: int) -> memoryview:
        owner: Array = np.ndarray(nbytes, np.uint8, self._map, offset)
        if self._on_release is not None:
            weakref.finalize(owner, self._on_release, offset).atexit = False
        return owner.data

    def peek(self, nbytes: int) -> memoryview:
        """The first bytes of the file, without a call of `on_release`; release the view before `close`."""
        return memoryview(self._map)[:nbytes]

    def close(self) -> None:
        """Unmaps the file; blocks that are still referred to stay readable."""
        _unmap(self._map)


def _unmap(mapping: mmap.mmap) -> None:
    try:
        mapping.close()
    except BufferError:
        pass  # arrays over the mapping keep it; it ends with the last one
