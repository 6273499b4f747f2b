"""The gRPC door on nghttp2: connections of the event loop, each with a session of the native module.

A connection feeds the bytes it receives to its session, which returns calls with whole messages. The bytes to send are
collected at the end of the loop's turn, so that the answers of a turn leave in one write for each connection. The
connection stops reading from a client that does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from inflight.wire import _http2
from inflight.wire._http2 import CALL, CLOSED, END, FAULT, MESSAGE, OPEN, PONG, UNKNOWN
from inflight.wire.connections import Allocate, OpenConnections
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.messages import Framed
from inflight.wire.grpc.nghttp2_calls import HIGH_WATER, Call, Head, HeldCall, QuickCall, fault, refuse, serve
from inflight.wire.grpc.rpc import Layout, StreamRpc
from inflight.wire.grpc.status import RESOURCE_EXHAUSTED, GrpcError, parse_timeout, unknown_method
from inflight.wire.http.bulk import aligned_buffer

MAX_STREAMS = 1024
"""Calls that one connection may have open."""
MAX_CALLS = 16_384
"""Calls whose handlers may run at once, over all connections."""
MAX_REPLIES = 256 << 20
"""Bytes of whole replies that may wait for one connection, or four of the largest messages."""
MAX_REQUESTS = 256 << 20
"""Bytes of requests that may wait on one connection, or four of the largest messages."""
STREAM_WINDOW = 4 << 20
"""HTTP/2 receive window of one request, in bytes."""
CONNECTION_WINDOW = 16 << 20
READ_TIMEOUT = 100.0
"""Seconds for a call's one request, and a second more for every `MIN_RATE` bytes of it."""
WRITE_TIMEOUT = 60.0
"""Seconds in which a client must read some of the bytes that wait in its socket, or of a finished answer."""
MIN_RATE = 64 * 1024
RETIRE_TIMEOUT = 1.0
"""Seconds for a client to notice that the server stops; a call that it begins meanwhile is served."""
_CHUNK = 256 * 1024
"""Bytes of one write to the socket."""
_SWEEP = 10.0


class Door:
    """State that the connections of one listener share."""

    def __init__(
        self,
        app: GrpcApp,
        shared: OpenConnections,
        loop: asyncio.AbstractEventLoop,
        first_byte_timeout: float,
        allocate: Allocate | None = None,
    ) -> None:
        """Args: allocate: allocates the buffers of large messages, for instance in shared memory."""
        self.app = app
        self.shared = shared
        self.loop = loop
        self.first_byte_timeout = first_byte_timeout
        self.routes = list(app.rpcs.items())
        limits = _http2.Limits()
        limits.message = app.max_message_bytes
        limits.requests = max(MAX_REQUESTS, 4 * app.max_message_bytes)
        limits.replies = max(MAX_REPLIES, 4 * app.max_message_bytes)
        limits.high_water = HIGH_WATER
        limits.streams = MAX_STREAMS
        limits.stream_window = STREAM_WINDOW
        limits.connection_window = CONNECTION_WINDOW
        routes = [(path, isinstance(rpc, StreamRpc) and rpc.duplex is not None) for path, rpc in self.routes]
        layouts = [rpc.layout for _, rpc in self.routes]
        self.native = _http2.Door(routes, limits, app.needs_key, partial(_place, allocate, layouts))
        self._waiting: list[Nghttp2Connection] = []
        self._sweeping: asyncio.TimerHandle | None = None

    def flush_later(self, connection: Nghttp2Connection) -> None:
        """Lets a connection write at the end of this turn."""
        if not self._waiting:
            self.loop.call_soon(self._flush)
        self._waiting.append(connection)

    def watch(self) -> None:
        """Starts the timer that cuts calls that wait too long, since a connection is open."""
        if self._sweeping is None:
            self._sweeping = self.loop.call_later(_SWEEP, self._sweep)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.write()

    def _sweep(self) -> None:
        self._sweeping = None
        for connection in self.shared.connections:
            cast(Nghttp2Connection, connection).expire()
        if self.shared.connections:
            self.watch()
        # Without connections the timer is not set again.


def _place(
    allocate: Allocate | None, layouts: Sequence[Layout | None], route: int, head: bytes, size: int
) -> memoryview | None:
    """The memory of a large message, in which its first tensor is aligned. Called by the native module."""
    layout = layouts[route]
    first = layout(head) if layout is not None else None
    return None if first is None else aligned_buffer(allocate, size, first)


class Nghttp2Connection(asyncio.Protocol):
    """One gRPC channel. It has no timeout between calls, because channels may be idle for hours. TCP keep-alive detects
    lost peers; a client that never sends a byte is cut."""

    def __init__(self, door: Door) -> None:
        self.session = _http2.Session(door.native)
        self.app = door.app
        self.loop = door.loop
        self.tasks = door.shared.tasks
        self.stopping = False
        self.calls: dict[int, Call | QuickCall | HeldCall] = {}
        self.transport: Any = None
        self._door = door
        self._flushing = False
        self._paused = False
        self._silent: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._retiring: asyncio.TimerHandle | None = None

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._door.shared.connections.add(self)
        self._door.watch()
        self._silent = self.loop.call_later(self._door.first_byte_timeout, transport.abort)  # type: ignore[attr-defined]
        self.flush()
        if self._door.shared.stopping:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._silent, self._stalled, self._retiring):
            if timer is not None:
                timer.cancel()
        self._door.shared.connections.discard(self)
        for call in list(self.calls.values()):
            call.cancel()

    def data_received(self, data: bytes) -> None:
        if self._silent is not None:
            self._silent.cancel()
            self._silent = None
        session = self.session
        self._tell(session.feed(data))
        if not self._flushing and (session.wants_write or session.over):
            self.flush()

    def pause_writing(self) -> None:
        self._paused = True
        if not self.transport.is_closing():
            self.transport.pause_reading()
        self._stalled = self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        self._paused = False
        if self._stalled is not None:
            self._stalled.cancel()
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self.flush()

    # The calls' side

    def name(self) -> object:
        """See `Connection`."""
        return id(self)

    def flush(self) -> None:
        """As `Connection` says."""
        if not self._flushing:
            self._flushing = True
            self._door.flush_later(self)

    def write(self) -> None:
        """Writes the session's bytes to the socket, as far as it takes them."""
        self._flushing = False
        transport, session = self.transport, self.session
        if transport.is_closing():
            return
        while not self._paused and (data := session.take(_CHUNK)) is not None:
            transport.write(data)
        if session.has_news:
            self._tell(session.news())
        if session.over:
            transport.close()

    # The listener's side

    def busy(self) -> bool:
        """Whether a call is open or its answer is not sent completely."""
        return bool(self.session.streams) or self.transport.get_write_buffer_size() > 0

    def shutdown(self) -> None:
        """Asks the client to use another connection (GOAWAY), and closes when its calls in flight are done."""
        if self._retiring is not None or self.transport.is_closing():
            return
        self.stopping = True
        self._retiring = self.loop.call_later(RETIRE_TIMEOUT, self._retired)
        self.session.notice()
        self.flush()
        for call in list(self.calls.values()):
            call.stop()

    def expire(self) -> None:
        """Cuts the calls that wait too long for their callers."""
        self.session.expire(READ_TIMEOUT, WRITE_TIMEOUT, MIN_RATE)
        self.flush()

    def _retired(self) -> None:
        """Refuses the calls that the client begins from now on: it has had time to see the GOAWAY."""
        if self._retiring is not None and not self.transport.is_closing():
            self._retiring.cancel()
            self.session.goaway()
            self.flush()

    # The session's events

    def _tell(self, events: list[tuple[Any, ...]]) -> None:
        for event in events:
            kind, stream = event[0], event[1]
            if kind == CALL:
                self._begin(*event[1:])
            elif kind == OPEN:
                _, _, route, timeout, encoding, key = event
                self._begin(stream, route, timeout, encoding, key, None, False)
            elif kind == UNKNOWN:
                refuse(self, stream, unknown_method(event[2].decode(errors="replace")))
            elif kind == PONG:
                self._retired()
            elif kind == CLOSED:
                if stream in self.calls:
                    self.calls[stream].cancel()
            elif not isinstance(call := self.calls.get(stream), Call):
                if kind == FAULT:
                    refuse(self, stream, fault(*event[2:]))
            elif kind == MESSAGE:
                call.put(Framed(event[3], event[2]))
            elif kind == END:
                call.put(None)
            elif kind == FAULT:
                call.put(fault(*event[2:]))
            else:
                call.drained()

    def _begin(
        self,
        stream: int,
        route: int,
        timeout: bytes | None,
        encoding: bytes | None,
        key: bytes | None,
        message: bytes | memoryview | None,
        compressed: bool,
    ) -> None:
        """Serves a new call. Args: message: None if its messages follow."""
        path, rpc = self._door.routes[route]
        deadline = None
        refusal: GrpcError | None = None
        try:
            rpc = self.app.admitted(path, rpc, key)
        except GrpcError as error:
            refusal = error
        if refusal is None and len(self.tasks) >= MAX_CALLS:
            text = f"{MAX_CALLS} calls are open, more are not taken; try again later"
            refusal = GrpcError(RESOURCE_EXHAUSTED, text)
        if timeout is not None and refusal is None:
            try:
                deadline = self.loop.time() + parse_timeout(timeout)
            except GrpcError as error:
                refusal = error
        if refusal is not None:
            refuse(self, stream, refusal)
            return
        framed = Framed(compressed, message) if message is not None else None
        serve(self, stream, Head(path, rpc, deadline, encoding), framed)
