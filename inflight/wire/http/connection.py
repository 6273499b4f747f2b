"""HTTP/1.1 connections on asyncio: httptools parses, an ASGI application answers.

It replaces uvicorn's protocol, which copies a body four times on its way and waits for a slow client without end, for
these reasons:

- a large body of known length is read from the socket straight into one buffer (no copy in this process), which may
  be shared memory; small bodies are passed on as the bytes that the parser made;
- a connection is cut after a deadline if its client sends a request, or reads a response, too slowly; there is one
  timer per connection, set again only when it fires, so that requests cost none;
- head and body of a response are sent in one system call, a large body without a copy;
- a request for a language model without a free place is refused as soon as its head is received, and the connection is
  then left unread for a while (`inflight.admission`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, cast

import httptools

from inflight.admission import COST, Arrival, Caller, gone
from inflight.wire.connections import HttpLimits, OpenConnections
from inflight.wire.http.asgi import App, Header, InlineApp, error_json
from inflight.wire.http.bulk import ALIGNMENT, BulkBody, DroppedBody, aligned_buffer, mapped, mapped_as_filled
from inflight.wire.http.exchange import Exchange
from inflight.wire.http.gate import Gate, GatedApp, Refusal
from inflight.wire.http.head import STATUS_LINES, http_scope

_logger = logging.getLogger("inflight.http")

INLINE_BYTES = 32 * 1024
"""Bytes of the largest body of a request that may be answered without a task (`InlineApp`). With a task a request takes
1.30 times the CPU time of the server's process, 93 against 72 us, and the rate is 0.82 times as high (the request of
the row "add, REST, 64 connections" of `bench.classic`, each way in turn, three rounds of 2 s). For larger bodies the
task's cost does not matter."""


class HttpConnection(asyncio.Protocol):
    """The protocol of one connection. `_reading` is the exchange whose request is being received, `_current` the one
    that is being answered; pipelined requests wait behind it in `_queue`.

    Args:
        caller: the client in the line of a model, if it waited there before this connection was made.
        kept: a place reserved for its first request.
    """

    transport: asyncio.Transport

    # More than 30 attributes, which is what instances of a class can share the layout of: without slots each access is
    # a look-up in a dictionary of the connection's own.
    __slots__ = (
        "__weakref__",
        "_app",
        "_awaits_continue",
        "_began",
        "_bulk",
        "_caller",
        "_client",
        "_close_when_read",
        "_current",
        "_gated",
        "_got",
        "_headers",
        "_inline",
        "_is_new",
        "_kept",
        "_last",
        "_last_read",
        "_left",
        "_length",
        "_limits",
        "_parser",
        "_queue",
        "_read_paused",
        "_reading",
        "_scheme",
        "_server",
        "_shared",
        "_timer",
        "_unsent",
        "_unsent_since",
        "_url",
        "_writable",
        "loop",
        "transport",
        "write_paused",
    )

    def __init__(
        self,
        app: App,
        shared: OpenConnections,
        loop: asyncio.AbstractEventLoop,
        limits: HttpLimits,
        caller: Caller | None = None,
        kept: Arrival | None = None,
    ) -> None:
        self.loop = loop
        self.write_paused = False
        self._app = app
        self._inline: InlineApp | None = cast(InlineApp, app) if hasattr(app, "inline") else None
        self._gated: GatedApp | None = cast(GatedApp, app) if hasattr(app, "gate") else None
        self._is_new = caller is None
        self._caller = caller or Caller(self._turn)
        self._caller.turn, self._caller.cost = self._turn, COST
        self._kept = kept
        self._shared = shared
        self._limits = limits
        self._parser: Any = self._new_parser()
        self._read_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._unsent_since = 0.0
        # The request that is being received.
        self._url = b""
        self._headers: list[Header] = []
        self._length = self._left = 0  # bytes of its body, and those of them that the parser has not got
        self._awaits_continue = False
        self._reading: Exchange | None = None
        self._bulk: BulkBody | None = None
        self._began = 0.0  # 0: no request is partly received
        self._last_read = 0.0
        self._got = 0
        # The requests that are being answered.
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._last = False  # no request is taken after those already received
        self._close_when_read = False

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._shared.connections.add(self)
        self._server = _address(transport.get_extra_info("sockname"))
        self._client = _address(transport.get_extra_info("peername"))
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._last_read = self.loop.time()
        self._timer = self.loop.call_later(self._check_interval(), self._check)
        if self._shared.stopping:
            self.transport.close()
        crowded = self._gated.crowded() if self._gated is not None and self._is_new else None
        if crowded is not None and crowded.came(self._caller):
            self.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.connections.discard(self)
        self._shared.lingering.done(self)
        self._caller.leave()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for exchange in (self._current, self._reading, *self._queue):
            if exchange is not None:
                exchange.lose()
        self._queue.clear()
        if self._kept is not None:
            self._kept.settle()
        self.resume_writing()
        # All of these refer back to this object: it would wait, with its bodies, for the garbage collector.
        self._current = self._reading = self._parser = self._bulk = None
        self._caller.turn = gone

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]  # the upgrade is ignored: what follows is HTTP/1.1
            if rest:
                self.data_received(rest)
            return
        except httptools.HttpParserError as error:
            self._refuse(400, f"invalid HTTP request: {error}")
            return
        if self._began:
            self._half_read(len(data))

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # The parser's side.

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._length = self._left = 0
        self._awaits_continue = False
        self._got = 0
        self._began = self._last_read = self.loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self._length = self._left = int(value)
        elif name == b"expect":
            self._awaits_continue = value.lower() == b"100-continue"
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._last:
            self._reading = None
            return
        parser = self._parser
        version = parser.get_http_version()
        keep_alive = version == "1.1" and not self._shared.stopping and parser.should_keep_alive()
        method = parser.get_method().decode("ascii")
        scope = http_scope(method, self._url, version, self._headers, self._scheme, self._client, self._server)
        gate = self._gated.gate(scope) if self._gated is not None else None
        exchange = self._reading = Exchange(
            self, scope, keep_alive=keep_alive, awaits_continue=self._awaits_continue, gate=gate
        )
        self._last = not keep_alive
        free = self._current is None and self._caller.line is None
        kept, self._kept = self._kept, None
        if kept is not None:
            exchange.keep(kept)
        elif gate is not None and free and (refusal := gate.refusal(self._length, self._caller)) is not None:
            self._turn_away(exchange, refusal)
            return
        if self._limits.large_body_bytes <= self._length <= self._limits.max_body_bytes:
            if free or gate is None:
                self._bulk = self._new_bulk(gate)
            if free:
                exchange.upload(self._length)
        if free:
            if self._inline is None or self._awaits_continue:
                self._start(exchange)
            elif 0 < self._length <= (INLINE_BYTES if gate is None else self._limits.max_body_bytes):
                self._current = exchange  # with or without a task: decided when its body is received
            else:
                self._start(exchange)
        else:
            self._queue.append(exchange)
            self.pause_reading()

    def on_body(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._bulk is not None:
            self._bulk.add(chunk)
        elif self._reading is not None:
            self._reading.feed(chunk)

    def on_message_complete(self) -> None:
        self._began = 0.0
        exchange, self._reading = self._reading, None
        bulk, self._bulk = self._bulk, None
        if exchange is not None:
            exchange.end(None if bulk is None else bulk.take())
            if exchange is self._current and exchange.task is None:
                gate = exchange.gate
                if gate is not None and not exchange.let_in and (refusal := gate.refusal(0, self._caller)) is not None:
                    self._turn_away(exchange, refusal)
                    return
                inline = None if self.write_paused or exchange.gate is not None else self._inline
                if inline is None or not exchange.run_inline(inline):
                    self._start(exchange)
        if self._close_when_read:
            self.transport.close()

    # The exchange's side.

    def pause_reading(self) -> None:
        if not self.transport.is_closing():
            self._read_paused = True
            # Again if need be: uvloop starts to read after `connection_made`, whatever that paused.
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._read_paused and not self._queue and not self._caller.waits and not self.transport.is_closing():
            self._read_paused = False
            self._last_read = self.loop.time()
            self.transport.resume_reading()

    async def writable(self) -> None:
        """Returns when the transport's write buffer has room."""
        while self.write_paused:
            if self._writable is None:
                self._writable = self.loop.create_future()
            await asyncio.shield(self._writable)

    def response_done(self, exchange: Exchange) -> None:
        """After the whole response of `exchange` was written: begins the next request, or closes the connection."""
        self._current = None
        if exchange.gate is not None:
            if not exchange.refused:
                exchange.gate.admission.served(self._caller)
            elif exchange.gate.admission.refused(self._caller, exchange.faulty, exchange.task is not None):
                self.pause_reading()
        if not exchange.keep_alive:
            self._last = True
            self._queue.clear()
            if exchange.complete or exchange.awaits_continue:
                self.transport.close()
            else:  # closing now could reset the connection before the client has read the answer
                self._close_when_read = True
                self.resume_reading()
            return
        if self._queue and not self._caller.waits:
            self._next()
        elif not self._began:
            self._last_read = self.loop.time()
        if self._read_paused:
            self.resume_reading()

    def _turn_away(self, exchange: Exchange, refusal: Refusal) -> None:
        """Refuses a request without the application; the rest of its body is dropped."""
        if exchange.awaits_continue and self._length:
            exchange.keep_alive = False  # the client may or may not send the body
            self._last = True
        self._current = exchange
        exchange.answer(refusal.status, refusal.headers, refusal.body, refused=True)

    def _turn(self, _offered: bool) -> bool:
        """The `turn` of its `Caller`: reads on after a pause."""
        if self._queue and self._current is None:
            self._next()
        self.resume_reading()
        return True

    def _next(self) -> None:
        """Begins the first request of the queue, or refuses it if its gate does, which is asked only now."""
        exchange = self._queue.popleft()
        coming = self._length if exchange is self._reading else 0
        refusal = exchange.gate.refusal(coming, self._caller) if exchange.gate is not None else None
        if refusal is not None:
            self._turn_away(exchange, refusal)
            return
        if coming >= self._limits.large_body_bytes:
            exchange.upload(coming)
        self._start(exchange)

    def forget(self, exchange: Exchange) -> None:
        """Drops `exchange`, after the application returned for it."""
        if exchange.task is not None:
            self._shared.tasks.discard(exchange.task)

    # The listener's side.

    def shutdown(self) -> None:
        """Closes at once if no request is in flight, else after the response. `stopping` must be set before."""
        latest = self._queue[-1] if self._queue else self._current
        if latest is not None:
            latest.keep_alive = False
        elif not self._began:
            self.transport.close()

    def busy(self) -> bool:
        """Whether a request is being received (and has no answer yet), run or answered."""
        if self._current is not None or self.transport.get_write_buffer_size() > 0:
            return True
        return self._began > 0 and (self._reading is None or not self._reading.finished)

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        exchange.start(self._app)
        assert exchange.task is not None
        self._shared.tasks.add(exchange.task)

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # A request after "connection: close" must not cause an error answer amid the response before it.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _new_bulk(self, gate: Gate | None) -> BulkBody:
        """A buffer for the body: in memory shared with workers, but not for language models, which have gates."""
        skip = 0
        for name, value in self._headers:
            if name == b"inference-header-content-length" and value.isdigit():
                skip = int(value) % ALIGNMENT
        allocate = self._limits.allocate
        if gate is not None:
            allocate = mapped if gate.bounds_uploads else mapped_as_filled
        return BulkBody(self, aligned_buffer(allocate, self._length, skip))

    def _half_read(self, size: int) -> None:
        """Handles `size` bytes that do not complete the request."""
        self._got += size
        self._last_read = self.loop.time()
        reading = self._reading
        if reading is not None and reading.finished:
            self._charge_dropped(reading, size)
            if self._left >= self._limits.large_body_bytes and not self.transport.is_closing():
                if reading.refused:
                    self._shared.lingering.add(self, self.transport.abort)
                self._bulk = None
                self._read_in_place(DroppedBody(self, self._left))
        elif self._bulk is not None:
            if self._current is self._reading and not self._read_paused:
                self._read_in_place(self._bulk)
        elif self._reading is None and not self._last and self._got > self._limits.max_head_bytes:
            self._refuse(431, f"the request's head is larger than {self._limits.max_head_bytes} bytes")

    def _charge_dropped(self, answered: Exchange, size: int) -> None:
        """Charges `size` bytes of an answered request to the model's budget, and stops reading if it is spent."""
        if answered.refused and answered.gate is not None and answered.gate.admission.dropped(self._caller, size):
            self.pause_reading()
        if self._close_when_read and self._got > self._limits.max_dropped_bytes:
            self.transport.abort()

    def _read_in_place(self, body: BulkBody | DroppedBody) -> None:
        """Makes `body` the transport's protocol for the rest of the body; `bulk_done` restores this one."""
        self.transport.pause_reading()
        self.transport.set_protocol(body)
        if not self._read_paused:
            self.transport.resume_reading()

    def bulk_read(self, size: int) -> None:
        """Notes `size` more bytes of the body in its buffer."""
        self._got += size
        self._last_read = self.loop.time()

    def bulk_dropped(self, size: int) -> None:
        """Notes `size` more bytes of the body of an answered request."""
        self.bulk_read(size)
        if self._reading is not None:
            self._charge_dropped(self._reading, size)

    def bulk_done(self) -> None:
        """Completes the request: its body is received. The parser, which still waits for it, is replaced."""
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        if not self._read_paused:
            self.transport.resume_reading()
        self._shared.lingering.done(self)
        self._parser = self._new_parser()
        self.on_message_complete()

    def _refuse(self, status: int, text: str) -> None:
        """Ends a connection whose request cannot be read, with an answer if no other response has begun."""
        _logger.info("%s, from %s", text, self._client)
        self._began = 0.0
        self._last = True
        answering = self._current
        if answering is None or (answering is self._reading and not answering.started):
            if answering is not None:
                answering.lose()
            body = error_json(text)
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINES[status] + head + body)
            self.transport.close()
        elif answering is self._reading:
            self.transport.abort()
        else:  # the response to an earlier request goes on
            self._queue.clear()
            answering.keep_alive = False
            self.pause_reading()

    def _check_interval(self) -> float:
        limits = self._limits
        return min(limits.idle_timeout, limits.read_timeout, limits.write_timeout)

    def _check(self) -> None:
        """Cuts the connection if a deadline is over, else sets the timer for the next one."""
        limits, now = self._limits, self.loop.time()
        wait = self._check_interval()
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent or not unsent:
            self._unsent, self._unsent_since = unsent, now
        elif now - self._unsent_since >= limits.write_timeout:
            self.transport.abort()
            return
        if self._began and not self._read_paused:
            due = min(self._last_read, self._began + self._got / limits.min_rate) + limits.read_timeout
            if due <= now:
                self._refuse(408, f"the request did not come within {limits.read_timeout:g} s")
            wait = min(wait, max(due - now, 0.001))
        elif self._current is None and not unsent:
            due = self._last_read + limits.idle_timeout
            if due <= now:
                self.transport.close()
            wait = min(wait, max(due - now, 0.001))
        self._timer = self.loop.call_later(wait, self._check)


def _address(name: Any) -> tuple[str, int] | None:
    return (name[0], name[1]) if isinstance(name, tuple) else None
