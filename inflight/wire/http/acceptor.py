"""Accepts connections, and refuses requests for a full language model before the event loop has a connection.

A transport, a protocol and a parser for a connection cost the event loop several times as much as a refusal. While a
language model is full, new connections stay bare sockets. Each is read when the line gives it a turn
(`inflight.admission`), is refused by one system call as soon as the head of its request is received, and becomes a
connection of the event loop only when it is let in or its request is for something else. With it the 99th percentile of
refusals was 1.4 to 1.5 s, without it 1.9 to 2.1 s (`python -m bench.overload --only "reconnect 1280"`, both in turn on
a machine that did other work too). The rest of a refused body is discarded in the kernel, a part at each turn of the
connection, so that the client can read its answer.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import httptools

from inflight.admission import Admission, Arrival, Caller, gone
from inflight.wire.connections import LARGE_BODY, Lingering
from inflight.wire.http.asgi import Header
from inflight.wire.http.gate import Gate, GatedApp
from inflight.wire.http.head import http_scope, response_head

_logger = logging.getLogger("inflight.http")

Connect: TypeAlias = "Callable[[Caller | None, Arrival | None], asyncio.Protocol]"
"""Makes the protocol of a connection. Args: the client in the line; the place reserved for its request."""

ACCEPTED_A_TURN = 64
"""Connections that are accepted before the loop does something else."""
LOOKED_AT = 16 * 1024
"""Bytes of a request that are examined; a request with a larger head is given to the event loop."""
SILENCE = 0.05
"""Seconds after which a connection without a byte is given to the event loop."""
DISCARDED_A_TURN = 1 << 20
"""Bytes of one refused body that are discarded before the loop does something else."""
FIRST_REST, LONGEST_REST = 0.01, 0.64
"""Seconds until an incomplete refused body is read again; doubled each time that no byte came."""
PATIENCE = 100.0
"""Seconds without a byte of a refused body after which its connection is closed."""
_RETRY = 0.25
"""Seconds between two attempts to accept while the process has no file descriptors left."""
GLANCE = 0.005
"""Seconds after which a connection without a byte is looked at again where there are places for small requests."""
_PEEK = socket.MSG_DONTWAIT | socket.MSG_PEEK
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_DISCARD = socket.MSG_DONTWAIT | (socket.MSG_TRUNC if sys.platform == "linux" else 0)
"""On Linux TCP discards bytes received with MSG_TRUNC without copying them (tcp(7)); elsewhere they are copied."""
_scratch = bytearray(DISCARDED_A_TURN)


class Acceptor:
    """Accepts the connections of one listening socket, which it owns.

    Args:
        connect: makes the protocol of a connection that is given to the event loop.

    Attributes:
        lingering: connections that still send the bodies of refused requests.
    """

    def __init__(
        self, bound: socket.socket, backlog: int, app: GatedApp, connect: Connect, lingering: Lingering
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound = bound
        self._app = app
        self._connect = connect
        self.lingering = lingering
        self._visitors: dict[_Visitor, None] = {}
        self._opening: dict[asyncio.Task[None], None] = {}
        self._retry: asyncio.TimerHandle | None = None
        bound.setblocking(False)
        bound.listen(backlog)
        self._loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Stops accepting, and closes the connections that have not been let in."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()
        for visitor in list(self._visitors):
            visitor.close()

    async def wait_closed(self) -> None:
        """Returns when every connection that was let in has been given to the event loop."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def gate(self, parsed: _Request) -> Gate | None:
        """The gate of a request's language model; None for other requests."""
        scope = http_scope(parsed.method, parsed.url, "1.1", parsed.headers)
        return self._app.gate(scope)

    def time(self) -> float:
        """The event loop's time, in seconds."""
        return self._loop.time()

    def open(self, visitor: _Visitor, kept: Arrival | None) -> None:
        """Gives the connection to the event loop. Args: kept: the place reserved for its first request."""
        self._visitors.pop(visitor, None)
        self._open(visitor.socket, visitor.caller, kept)

    def forget(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor, None)

    def later(self, seconds: float, visitor: _Visitor, crowded: Admission) -> None:
        """Lets the visitor arrive again, unless it has left by then."""

        def again() -> None:
            if visitor in self._visitors:
                visitor.arrive(crowded)

        self._loop.call_later(seconds, again)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_A_TURN):
            try:
                accepted, _ = self._bound.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                _logger.error("cannot accept a connection, tried again in %g s: %s", _RETRY, error)
                self._loop.remove_reader(self._bound)
                self._retry = self._loop.call_later(_RETRY, self._loop.add_reader, self._bound, self._accept)
                return
            crowded = self._app.crowded()
            if crowded is None:
                self._open(accepted, None, None)
            else:
                began = time.thread_time()
                visitor = _Visitor(accepted, self)
                self._visitors[visitor] = None
                visitor.arrive(crowded)
                crowded.spent(time.thread_time() - began)

    def _open(self, accepted: socket.socket, caller: Caller | None, kept: Arrival | None) -> None:
        task = self._loop.create_task(self._opened(accepted, caller, kept))
        self._opening[task] = None
        task.add_done_callback(self._opening.pop)

    async def _opened(self, accepted: socket.socket, caller: Caller | None, kept: Arrival | None) -> None:
        accepted.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(partial(self._connect, caller, kept), accepted)
        except OSError as error:
            _logger.info("a connection is lost before its first request: %s", error)
            accepted.close()
            if kept is not None:
                kept.settle()


class _Sight(enum.Enum):
    """The state of a connection that has no request for a language model."""

    GONE = enum.auto()
    SILENT = enum.auto()
    DROPPING = enum.auto()  # the body of a refused request is incomplete
    OTHER = enum.auto()


class _Asked(NamedTuple):
    """A request for a language model, of which the head was received.

    Attributes:
        size: bytes of the whole request.
        here: bytes of it that were examined.
        body: bytes of its body.
    """

    gate: Gate
    size: int
    here: int
    body: int
    keep_alive: bool


class _Request:
    """The received part of a connection's first request; the parser calls the `on_` methods.

    Attributes:
        length: bytes of the body as announced in the head; None: not announced.
        received: bytes of the body that were received.
    """

    __slots__ = (
        "_parser",
        "begun",
        "complete",
        "headers",
        "keep_alive",
        "length",
        "method",
        "received",
        "url",
        "version",
    )

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self.keep_alive = False
        self.version = ""
        self.method = ""
        self.url = b""
        self.headers: list[Header] = []
        self.length: int | None = None
        self.received = 0
        self.begun = 0
        self.complete = False

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self.length = int(value)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.method, self.version = parser.get_method().decode("ascii"), parser.get_http_version()
        self.keep_alive = parser.should_keep_alive()

    def on_body(self, chunk: bytes) -> None:
        self.received += len(chunk)

    def on_message_complete(self) -> None:
        self.complete = True

    def parse(self, data: bytes) -> bool:
        """Parses the beginning of a connection's bytes; returns False if it is not HTTP."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        finally:
            self._parser = None  # it refers back to this object
        return True

    def size(self, data: bytes) -> int:
        """Size in bytes of the request at the beginning of `data`, which was parsed; 0: not known yet."""
        if self.complete:
            return len(data)
        head = data.find(b"\r\n\r\n") + 4
        if self.length is None or head + self.received != len(data):
            return 0
        return head + self.length


class _Visitor:
    """A connection that has not been let in.

    Attributes:
        _left: bytes of a refused request that have not been read from the socket.
        _heard: loop time at which the last of them came.
        _rest: seconds until the next attempt to read more of them.
        _closing: the connection ends with the refused request.
        _seen: unread bytes at the last look, whose result is `_sight`.
        _waited: the client has had `SILENCE` seconds to send a byte.
    """

    __slots__ = ("_acceptor", "_closing", "_heard", "_left", "_rest", "_seen", "_sight", "_waited", "caller", "socket")

    def __init__(self, accepted: socket.socket, acceptor: Acceptor) -> None:
        self.socket = accepted
        self.caller = Caller(self.turn, cost=0.0)
        self._acceptor = acceptor
        self._left = 0
        self._heard = 0.0
        self._rest = FIRST_REST
        self._closing = False
        self._seen = 0
        self._sight: _Sight | _Asked = _Sight.SILENT
        self._waited = False

    def arrive(self, crowded: Admission) -> None:
        """Handles the new connection, or puts it in line. Args: crowded: the admission of a full model."""
        sight = self._look()
        if sight is _Sight.SILENT and not crowded.full:
            self._glance(crowded)
            return
        if sight is _Sight.GONE or sight is _Sight.OTHER:
            self._deal(sight, crowded)
            return
        line = crowded
        if isinstance(sight, _Asked):
            line = sight.gate.admission
            line.sees(self.caller, sight.body >= LARGE_BODY)
        if not line.came(self.caller):
            self._take_turn(line)

    def _glance(self, crowded: Admission) -> None:
        """Waits a moment for the head of its first request, not in line: only one with a large body may have to."""
        if self._waited:
            self._acceptor.open(self, None)
        else:
            self._waited = True
            self._acceptor.later(GLANCE, self, crowded)

    def turn(self, offered: bool) -> bool:
        """The `turn` of its `Caller`."""
        line = self.caller.met
        assert line is not None
        return self._take_turn(line)

    def close(self) -> None:
        self.caller.leave()
        self.caller.turn = gone  # which referred back to this object
        self._acceptor.lingering.done(self)
        self._acceptor.forget(self)
        self.socket.close()

    def _take_turn(self, line: Admission) -> bool:
        began = time.thread_time()  # CPU time: other processes may be busy too
        used = self._deal(self._look(), line)
        line.spent(time.thread_time() - began)
        return used

    def _deal(self, sight: _Sight | _Asked, line: Admission) -> bool:
        """Acts on `sight`; returns True if a place was taken for the request."""
        if sight is _Sight.GONE:
            self.close()
        elif sight is _Sight.DROPPING:
            self._await_more(line)
        elif sight is _Sight.SILENT and not self._waited:
            self._waited = True
            line.rest(self.caller, SILENCE)
        elif not isinstance(sight, _Asked):
            self._acceptor.open(self, None)
        elif sight.here == sight.size and not sight.gate.admission.full:
            self._acceptor.open(self, Arrival(sight.gate.admission))
            return True
        else:
            self._answer(sight)
        return False

    def _answer(self, asked: _Asked) -> None:
        """Refuses the request, or opens a connection for it if its gate does not."""
        gate = asked.gate
        refusal = gate.refusal(asked.body, self.caller)
        if refusal is None:
            self._acceptor.open(self, None)
            return
        head = response_head(refusal.status, refusal.headers, len(refusal.body), asked.keep_alive)
        answer = head + refusal.body
        try:
            sent = self.socket.send(answer, _SEND)
        except OSError:
            sent = 0
        self._seen, self._waited = 0, False
        self._left, self._closing = asked.size, not asked.keep_alive
        if sent != len(answer) or not self._discard():
            self.close()
        elif self._left:
            self._acceptor.lingering.add(self, self.close)
            if not gate.admission.refused(self.caller, fault=refusal is gate.too_large):
                self._await_more(gate.admission)
        elif not gate.admission.refused(self.caller, fault=refusal is gate.too_large):
            self._acceptor.open(self, None)

    def _await_more(self, line: Admission) -> None:
        line.rest(self.caller, self._rest)
        self._rest = min(2 * self._rest, LONGEST_REST)

    def _discard(self) -> bool:
        """Discards more of the refused request; returns False if the connection has ended."""
        now = self._acceptor.time()
        room = DISCARDED_A_TURN
        while self._left and room:
            try:
                size = self.socket.recv_into(_scratch, min(self._left, room), _DISCARD)
            except BlockingIOError:
                break
            except OSError:
                return False
            if not size:
                return False
            self._left -= size
            room -= size
        if room < DISCARDED_A_TURN:
            self._heard, self._rest = now, FIRST_REST
        if self._left:
            return now - self._heard < PATIENCE
        self._acceptor.lingering.done(self)
        return not self._closing

    def _look(self) -> _Sight | _Asked:
        """Examines the bytes that the client has sent. A request that was not refused stays in the socket."""
        if self._left:
            if not self._discard():
                return _Sight.GONE
            if self._left:
                return _Sight.DROPPING
        try:
            data = self.socket.recv(LOOKED_AT, _PEEK)
        except BlockingIOError:
            return _Sight.SILENT
        except OSError:
            return _Sight.GONE
        if not data:
            return _Sight.GONE
        if len(data) != self._seen:
            self._seen = len(data)
            self._sight = self._read(data)
        return self._sight

    def _read(self, data: bytes) -> _Sight | _Asked:
        request = _Request()
        if not request.parse(data) or request.begun != 1 or request.version != "1.1":
            return _Sight.OTHER
        size = request.size(data)
        if not size or (not request.complete and any(name == b"expect" for name, _ in request.headers)):
            return _Sight.OTHER
        gate = self._acceptor.gate(request)
        if gate is None or gate.overloaded is None:
            return _Sight.OTHER
        return _Asked(gate, size, len(data), request.length or 0, request.keep_alive)
