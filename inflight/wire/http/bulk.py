"""Reads large request bodies from the socket straight into one buffer."""

from __future__ import annotations

import asyncio
import mmap
from typing import Protocol

import numpy as np

from inflight.wire.connections import Allocate

ALIGNMENT = 64
"""Bytes; vector instructions and device copies are fastest on addresses that are multiples of it."""
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
_POPULATED = 8 << 20
"""Bytes of the largest body for which memory is taken before it comes."""
_scratch = memoryview(bytearray(256 * 1024))
"""Buffer for the dropped bodies of all connections; being shared, it stays in the processor's cache."""


class Carrier(Protocol):
    """The interface of a connection to a body that reads its socket."""

    def bulk_read(self, size: int) -> None:
        """`size` more bytes of the body are in its buffer."""

    def bulk_dropped(self, size: int) -> None:
        """`size` more bytes of a dropped body were received."""

    def bulk_done(self) -> None:
        """The whole body was received."""

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class _Body(asyncio.BufferedProtocol):
    """The protocol of a connection while it receives a body: the connection itself handles all other events."""

    def __init__(self, connection: Carrier) -> None:
        self._connection = connection

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)


class BulkBody(_Body):
    """The protocol of a connection while it receives the rest of one large body into its buffer.

    Attributes:
        view: the buffer, exactly as long as the body.
    """

    def __init__(self, connection: Carrier, view: memoryview) -> None:
        super().__init__(connection)
        self.view = view
        self._received = 0

    def add(self, chunk: bytes) -> None:
        """Adds the first part of the body, which was received with the head."""
        end = self._received + len(chunk)
        self.view[self._received : end] = chunk
        self._received = end

    def take(self) -> memoryview:
        """The whole body, which this object then drops: uvloop keeps references to a transport's former protocol."""
        whole, self.view = self.view, memoryview(b"")
        return whole

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.view[self._received :]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += nbytes
        self._connection.bulk_read(nbytes)
        if self._received == len(self.view):
            self._connection.bulk_done()


class DroppedBody(_Body):
    """The protocol of a connection while it receives and drops the rest of a body whose request has been answered.

    Args:
        size: bytes still to come.
    """

    def __init__(self, connection: Carrier, size: int) -> None:
        super().__init__(connection)
        self._left = size

    def get_buffer(self, sizehint: int) -> memoryview:
        return _scratch[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        self._connection.bulk_dropped(nbytes)
        if not self._left:
            self._connection.bulk_done()


def mapped(size: int) -> memoryview:
    """`size` mapped bytes, which go back to the system as soon as nothing refers to them.

    The C library keeps freed buffers of megabytes for later use, and cannot return them while a small object lies above
    them. Pages of bodies of ordinary size are made at once, which takes half the time of a fault for each (0.4 against
    0.75 ms for 1.9 MB that are then filled). Only for bodies of which few come in at a time (`Gate.bounds_uploads`).
    """
    return _mapped(size, _POPULATE if size <= _POPULATED else 0)


def mapped_as_filled(size: int) -> memoryview:
    """As `mapped`, but memory is taken only for what has come."""
    return _mapped(size, 0)


def _mapped(size: int, flags: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags))


def aligned_buffer(allocate: Allocate | None, size: int, skip: int) -> memoryview:
    """`size` writable bytes with byte number `skip` at an aligned address, where a binary tensor begins."""
    space = size + ALIGNMENT
    buffer = allocate(space) if allocate is not None else None
    if buffer is None:
        buffer = np.empty(space, np.uint8).data  # unlike a bytearray it is not filled with zeros first
    start = -(np.frombuffer(buffer, np.uint8).ctypes.data + skip) % ALIGNMENT
    return buffer[start : start + size]
