"""State that the connections of one listener share: the open connections, the running requests, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

LARGE_BODY = 128 * 1024
Allocate = Callable[[int], "memoryview | None"]
"""Gives a writable buffer of at least that many bytes for a request body, or None to use process memory."""


@dataclass(frozen=True)
class HttpLimits:
    """What one HTTP/1.1 connection may take.

    Attributes:
        max_body_bytes: no buffer is set aside for a body that says it is larger; refusing it is the application's.
        large_body_bytes: from this size on, a body of known length is read straight into one buffer.
        idle_timeout: seconds a connection may rest between requests, or before its first.
        read_timeout: seconds without a byte of a request that has begun. The whole request may take this long plus
            what its bytes take at `min_rate`; so a client that sends a few bytes at a time is cut too.
        min_rate: bytes per second.
        write_timeout: seconds without a byte taken by a client that reads its response too slowly.
        max_head_bytes: request line and headers.
        max_dropped_bytes: how much of a refused body is read and dropped, so that the client sees the answer.
        allocate: gives the buffer of a large body.
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
    """One open connection, as its listener sees it when it stops."""

    @property
    def transport(self) -> asyncio.Transport:
        """Its socket."""

    def shutdown(self) -> None:
        """Closes at once where no request is in flight, else after the response."""

    def busy(self) -> bool:
        """Whether a request is in flight: it comes in, runs, or its response is on its way."""


class OpenConnections:
    """Every connection and request of one listener.

    Attributes:
        stopping: no connection serves another request after the one it has.
        connections: those that are open.
        tasks: the applications that run, one per request.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
