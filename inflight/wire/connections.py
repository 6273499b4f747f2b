"""State that the connections of one listener share: the open connections, the running requests, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

LARGE_BODY = 128 * 1024
LINGERING = 1024
"""Connections of one listener that may send the rest of a refused body at a time."""
Allocate = Callable[[int], "memoryview | None"]
"""Returns a writable buffer of at least that many bytes for a request body, or None to use process memory."""


@dataclass(frozen=True)
class HttpLimits:
    """Limits of one HTTP/1.1 connection.

    Attributes:
        max_body_bytes: no buffer is allocated for a body announced as larger; the application refuses it.
        large_body_bytes: from this size on, a body of known length is read straight into one buffer.
        idle_timeout: seconds a connection may be idle between requests, or before its first.
        read_timeout: seconds without a byte of a request that has begun. The whole request may take this long plus
            the time of its bytes at `min_rate`; so a client that sends a few bytes at a time is cut too.
        min_rate: bytes per second.
        write_timeout: seconds without a byte taken by a client that reads its response too slowly.
        max_head_bytes: bytes of request line and headers.
        max_dropped_bytes: bytes of a refused body that are read and dropped, so that the client sees the answer.
        allocate: allocates the buffer of a large body.
    """

    max_body_bytes: int
    large_body_bytes: int = LARGE_BODY
    idle_timeout: float = 100.0
    read_timeout: float = 100.0
    min_rate: float = 16 * 1024
    write_timeout: float = 100.0
    max_head_bytes: int = 64 * 1024
    max_dropped_bytes: int = 1 << 30
    allocate: Allocate | None = None


class Connection(Protocol):
    """The interface of an open connection to its listener, which uses it to stop."""

    @property
    def transport(self) -> asyncio.Transport:
        """Its socket."""

    def shutdown(self) -> None:
        """Closes at once if no request is in flight, else after the response."""

    def busy(self) -> bool:
        """Whether a request is in flight: being received, run or answered."""


class Lingering:
    """The connections that were refused amid a large body. What still comes of it is dropped, so that a client which
    reads only after it has sent everything gets its answer.

    One more than `LINGERING` closes the connection that was refused first. Else the connections of clients that leave
    after a refusal would pile up, because dropping has a budget, and the kernel keeps megabytes of unread data for
    each: then it has no memory for the packets of other connections, which are lost and sent again much later.
    """

    def __init__(self) -> None:
        self._closers: dict[object, Callable[[], None]] = {}

    def add(self, connection: object, close: Callable[[], None]) -> None:
        """Notes that a connection was refused. Does nothing if it is noted already."""
        if connection in self._closers:
            return
        self._closers[connection] = close
        if len(self._closers) > LINGERING:
            self._closers.pop(next(iter(self._closers)))()

    def done(self, connection: object) -> None:
        """Notes that the body of a connection, if it was noted, is over, or the connection is."""
        self._closers.pop(connection, None)


class OpenConnections:
    """Every connection and request of one listener.

    Attributes:
        stopping: connections serve no further request after the current one.
        connections: the open ones.
        tasks: the running applications, one per request.
        lingering: connections that still send the bodies of refused requests.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.lingering = Lingering()
