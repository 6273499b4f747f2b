"""One HTTP/1.1 request and its response: the `receive` and `send` of one ASGI call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Token
from typing import Any, Protocol

from inflight.admission import Arrival, arrival
from inflight.wire.http.asgi import App, Header, InlineApp, Message, Scope, error_json
from inflight.wire.http.gate import Gate
from inflight.wire.http.head import STATUS_LINES, response_head

_logger = logging.getLogger("inflight.http")

HIGH_WATER = 64 * 1024
"""Bytes of a body that may wait for the application before the connection stops reading."""
_FAULTS = (400, 413, 415, 422)
_JOINED = 64 * 1024
"""Up to this size head and body are joined into one write: cheaper than a second system call."""


class Carrier(Protocol):
    """The interface of a connection to its exchanges.

    Attributes:
        write_paused: its client reads the response too slowly.
    """

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    write_paused: bool

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    async def writable(self) -> None:
        """Returns when the transport's write buffer has room."""

    def response_done(self, exchange: Exchange) -> None:
        """Is called after the whole response was written."""

    def forget(self, exchange: Exchange) -> None:
        """Is called after the application returned."""


class Exchange:
    """One request and its response on a connection, which feeds it the request and writes the response.

    A request body is `bytes`, `bytearray` or, if it was read in place, one writable `memoryview`. Only one `receive`
    may wait at a time.

    Attributes:
        complete: the whole request was received.
        finished: the whole response was given to the transport.
        lost: the client is gone; `send` does nothing and `receive` returns a disconnect.
        keep_alive: the connection serves another request after this one.
        cancel: called when the client leaves while the request is answered inline.
        awaits_continue: the client waits for `100 Continue` before it sends the body.
        gate: of the request's language model; None for other requests.
        refused: the response was an error; faulty: and the request's own fault.
    """

    __slots__ = (
        "_arrival",
        "_body",
        "_bodyless",
        "_chunked",
        "_connection",
        "_head",
        "_left",
        "_told_end",
        "_uploading",
        "_waiter",
        "awaits_continue",
        "cancel",
        "complete",
        "faulty",
        "finished",
        "gate",
        "keep_alive",
        "lost",
        "refused",
        "scope",
        "task",
    )

    def __init__(
        self,
        connection: Carrier,
        scope: Scope,
        *,
        keep_alive: bool,
        awaits_continue: bool,
        gate: Gate | None = None,
    ) -> None:
        self.scope = scope
        self.gate = gate
        self.refused = self.faulty = False
        self._arrival: Arrival | None = None
        self.keep_alive = keep_alive
        self.awaits_continue = awaits_continue
        self.complete = False
        self.finished = False
        self.lost = False
        self.task: asyncio.Task[None] | None = None
        self.cancel: Callable[[], None] | None = None
        self._connection = connection
        self._body: bytes | bytearray | memoryview = b""
        self._told_end = False
        self._uploading = 0
        self._waiter: asyncio.Future[None] | None = None
        self._head: bytes | None = None  # None: the application has not given it yet; b"": sent
        self._chunked = False
        self._bodyless = False
        self._left: int | None = None

    @property
    def started(self) -> bool:
        """Whether a part of the response may have been sent."""
        return self._head == b""

    # The connection's side.

    def feed(self, chunk: bytes) -> None:
        """Adds a part of the body."""
        if self.finished or self.lost:
            return
        if not self._body:
            self._body = chunk
        elif isinstance(self._body, bytearray):
            self._body += chunk
        else:
            self._body = bytearray(self._body) + chunk
        if self.task is not None:  # else nobody waits for it yet
            if len(self._body) > HIGH_WATER:
                self._connection.pause_reading()
            self._wake()

    @property
    def let_in(self) -> bool:
        """Whether a place is reserved for it."""
        return self._arrival is not None

    def keep(self, place: Arrival) -> None:
        """Takes the place that was reserved for it."""
        self._arrival = place

    def upload(self, size: int) -> None:
        """Counts a large body of `size` bytes that begins to come in."""
        if self.gate is not None:
            self._uploading = size
            self.gate.admission.uploading += size
            self.gate.admission.swallows(size)

    def _uploaded(self) -> None:
        if self._uploading and self.gate is not None:
            self.gate.admission.uploading -= self._uploading
            self._uploading = 0

    def end(self, whole: memoryview | None = None) -> None:
        """Completes the request. Args: whole: its body, if that was read in place."""
        self.complete = True
        if self._uploading:
            self._uploaded()
        if whole is not None:
            self._body = whole
        if self._waiter is not None:
            self._wake()

    def lose(self) -> None:
        """Ends the work: the client is gone."""
        self.lost = not self.finished
        self._body = b""
        self._settle()
        self._uploaded()
        self._wake()
        if self.cancel is not None:
            cancel, self.cancel = self.cancel, None
            cancel()

    def start(self, app: App) -> None:
        """Begins to run the application in a task."""
        token = self._let_in()
        self.task = self._connection.loop.create_task(self.run(app))
        if token is not None:
            arrival.reset(token)

    def run_inline(self, app: InlineApp) -> bool:
        """Lets the application answer without a task. Returns False if it needs its ASGI call."""
        token = None if self.gate is None and self._arrival is None else self._let_in()
        self.cancel = app.inline(self.scope, bytes(self._body), self.answer)
        if self.cancel is not None:
            self._body = b""  # the application has read it
        if token is not None:
            arrival.reset(token)
            if self.cancel is None:
                self._settle()
        return self.cancel is not None

    def _let_in(self) -> Token[Arrival | None] | None:
        """Reserves a place for a request that has passed a gate, until it takes the place or is answered."""
        if self._arrival is None:
            if self.gate is None or self.gate.overloaded is None or not self.complete:
                return None
            self._arrival = Arrival(self.gate.admission)
        return arrival.set(self._arrival)

    def _judge(self, status: int, refused: bool = False) -> None:
        """Notes whether the response that begins is an error and whose fault it is."""
        self.refused = refused or status >= 400
        self.faulty = status in _FAULTS
        self._settle()

    def _settle(self) -> None:
        """Ends the reservation of a place: the request is answered or its client is gone."""
        if self._arrival is not None:
            self._arrival.settle()

    def answer(self, status: int, headers: list[Header], body: bytes, *, refused: bool = False) -> None:
        """Sends a whole response, unless the client is gone. Args: refused: it is an error, whatever its status."""
        self.cancel = None
        if self.lost:
            return
        if self.gate is not None or self._arrival is not None or status >= 400 or refused:
            self._judge(status, refused)
        head = response_head(status, headers, len(body), self.keep_alive)
        self._head = self._body = b""
        self.finished = True
        if len(body) <= _JOINED:
            self._connection.transport.write(head + body)
        else:
            self._connection.transport.write(head)
            self._connection.transport.write(body)
        self._connection.response_done(self)

    async def run(self, app: App) -> None:
        """Calls the application. In all cases the client gets one answer or a closed connection."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:  # only a listener that stops cancels
            self._connection.transport.abort()
        except Exception:
            _logger.exception("unhandled error, %s %s", self.scope["method"], self.scope["path"])
            await self._fail()
        else:
            if not (self.finished or self.lost):
                _logger.error("no complete response, %s %s", self.scope["method"], self.scope["path"])
                await self._fail()
        finally:
            self._connection.forget(self)

    # The application's side.

    async def receive(self) -> Message:
        """The next ASGI message: a part of the body, or `http.disconnect` once the response or the client is gone."""
        while True:
            if self.lost or self.finished:
                return {"type": "http.disconnect"}
            if not self._told_end and (self._body or self.complete):
                body, self._body = self._body, b""
                self._told_end = self.complete
                return {"type": "http.request", "body": body, "more_body": not self.complete}
            if not self.complete:
                if self.awaits_continue and self._head is None:
                    self.awaits_continue = False
                    self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._connection.resume_reading()
            self._waiter = self._connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def send(self, message: Message) -> None:
        """Sends one ASGI message of the response; waits while the client reads too slowly.

        Raises:
            RuntimeError: messages out of order, or a body of another length than announced.
        """
        if self.lost:
            return
        if self._head is None:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"the response starts with http.response.start, not {message['type']}")
            self._head = self._start(message)
            return
        if self.finished or message["type"] != "http.response.body":
            raise RuntimeError(f"unexpected {message['type']}, the response is {'over' if self.finished else 'open'}")
        if self._connection.write_paused:
            await self._connection.writable()
        self._write(message.get("body", b""), message.get("more_body", False))

    def _start(self, message: Message) -> bytes:
        """The head of the response, which is sent with the first part of the body."""
        status: int = message["status"]
        self._judge(status, message.get("refused", False))
        parts = [STATUS_LINES[status]]
        for name, value in message.get("headers", ()):
            lower = name.lower()
            if lower == b"content-length":
                self._left = int(value)
            elif lower == b"connection":
                self.keep_alive = self.keep_alive and b"close" not in value.lower()
                continue
            elif lower == b"transfer-encoding":
                continue
            if b"\n" in value or b"\r" in value:
                raise RuntimeError(f"header {name!r} holds a line break")
            parts += (name, b": ", value, b"\r\n")
        self._bodyless = self.scope["method"] == "HEAD" or status in (204, 304)
        if self._left is None and not self._bodyless:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if self.awaits_continue and not self.complete:
            self.keep_alive = False  # the client may or may not send the body
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    def _write(self, body: bytes | bytearray | memoryview, more: bool) -> None:
        if self.lost:
            return
        parts: list[Any] = [self._head] if self._head else []
        self._head = b""
        if not self._bodyless:
            size = len(body)
            if self._left is not None:
                self._left -= size
                if self._left < 0 or (self._left and not more):
                    raise RuntimeError("the response's body is not as long as its content-length")
            if size and self._chunked:
                parts += (b"%x\r\n" % size, body, b"\r\n")
            elif size:
                parts.append(body)
            if self._chunked and not more:
                parts.append(b"0\r\n\r\n")
        write = self._connection.transport.write
        if sum(map(len, parts)) <= _JOINED:
            write(b"".join(parts))
        else:
            for part in parts:
                write(part)
        if not more:
            self.finished = True
            self._wake()
            self._connection.response_done(self)

    async def _fail(self) -> None:
        """Answers for an application that failed: with an error status if none was sent, else by closing."""
        if self.lost:
            return
        if self._head:  # given, but not sent
            self._head, self._left, self._chunked = None, None, False
        if self._head is not None:
            self._connection.transport.abort()
            return
        body = error_json("internal server error, the server's log has the details")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
