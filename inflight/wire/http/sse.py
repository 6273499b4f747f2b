"""Server-sent events: a stream of JSON frames that waits for slow clients and detects lost ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from typing import Generic, TypeVar

from inflight.errors import InflightError
from inflight.wire.http.asgi import Header, Send

T = TypeVar("T")

KEEP_ALIVE = 15.0
"""Seconds without an event after which an empty frame is sent, so that proxies do not close the stream as idle."""
_HEADERS: tuple[Header, ...] = ((b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"))
DONE = b"[DONE]"


class EventStream:
    """One response of events; an async context manager around the sending.

    `event` waits while the client reads too slowly, so a slow reader delays only its own generation.
    """

    def __init__(self, send: Send, headers: Iterable[Header] = (), *, idle: bytes = b":\n\n") -> None:
        """Args: idle: the whole frame that is sent when there was no event for `KEEP_ALIVE` seconds; a comment."""
        self._send = send
        self._idle = idle
        self._headers = [*_HEADERS, *headers]
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        self._last = self._loop.time()
        self._timer = self._loop.call_later(KEEP_ALIVE, self._keep_alive)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            await asyncio.gather(self._comment, return_exceptions=True)
        if error[0] is None:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def event(self, data: bytes, mark: bytes | None = None) -> None:
        """Sends one frame. Args: mark: written before the data in place of `data: `."""
        self._last = self._loop.time()
        body = (b"data: " if mark is None else mark) + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def _keep_alive(self) -> None:
        """Sends the idle frame if there was no event. One timer serves the stream; it is set again when it fires."""
        rest = self._last + KEEP_ALIVE - self._loop.time()
        if rest <= 0:
            self._last = self._loop.time()
            message = {"type": "http.response.body", "body": self._idle, "more_body": True}
            self._comment = self._loop.create_task(self._sent(message))
            rest = KEEP_ALIVE
        self._timer = self._loop.call_later(rest, self._keep_alive)

    async def _sent(self, message: dict[str, object]) -> None:
        await self._send(message)


class Opened(Generic[T]):
    """Events of one generation, or parts of one request, of which the first is awaited before the response begins.

    So a refused request gets its own status. A long prompt does not hold the headers back: after `KEEP_ALIVE` seconds
    the stream begins without its first event.
    """

    def __init__(self, events: AsyncGenerator[T, None]) -> None:
        self._events = events
        self._first: asyncio.Task[T] | None = None
        self._first_taken = False

    async def open(self) -> Opened[T]:
        """Waits for the first event.

        Raises:
            InflightError: the request was refused, or failed before its first token.
        """
        self._first = asyncio.ensure_future(_next(self._events))
        try:
            await asyncio.wait([self._first], timeout=KEEP_ALIVE)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def first(self) -> T | None:
        """The first event; None where it was not awaited to its end."""
        task = self._first
        return task.result() if task is not None and task.done() and not task.cancelled() else None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    def __anext__(self) -> Awaitable[T]:
        """The generator's next event, without a wrapper in between."""
        if self._first_taken:
            return self._events.__anext__()
        assert self._first is not None
        self._first_taken = True
        return self._first

    async def close(self) -> None:
        """Ends the generation in any state."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._events.aclose()


async def _next(events: AsyncGenerator[T, None]) -> T:
    async for event in events:
        return event
    raise InflightError("the generation ended without an event")
