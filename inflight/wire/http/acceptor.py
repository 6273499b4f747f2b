"""Connections before anything is spent on them.

A transport, a protocol and a parser for each connection cost the event loop several times what a refusal costs. Where
a language model takes nobody, connections stay bare sockets: each is looked at when the line says so
(`inflight.admission`), is answered by one system call where its whole request is here and has no chance, and becomes
one of the event loop's connections only when it is let in, or when it wants something else.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import httptools

from inflight.admission import Admission, Arrival, Caller
from inflight.wire.http.asgi import Header
from inflight.wire.http.gate import Gate, GatedApp
from inflight.wire.http.head import http_scope, response_head

_logger = logging.getLogger("inflight.http")

Connect: TypeAlias = "Callable[[Caller | None, Arrival | None], asyncio.Protocol]"
"""Makes the protocol of a connection. Args: what the line knows of it; the place that is kept for its request."""

ACCEPTED_A_TURN = 64
"""So many connections are accepted before the loop does something else."""
LOOKED_AT = 16 * 1024
"""Bytes of a request that can be refused here."""
SILENCE = 0.05
"""Seconds that a connection which has said nothing is left alone before it is made one of the event loop's."""
_RETRY = 0.25
"""Seconds until it is tried again to accept, where there are no descriptors left."""
_PEEK = socket.MSG_DONTWAIT | socket.MSG_PEEK
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Acceptor:
    """Accepts what comes to one listening socket, which it owns.

    Args:
        connect: for connections that become the event loop's.
    """

    def __init__(self, bound: socket.socket, backlog: int, app: GatedApp, connect: Connect) -> None:
        self._loop = asyncio.get_running_loop()
        self._bound = bound
        self._app = app
        self._connect = connect
        self._visitors: dict[_Visitor, None] = {}
        self._opening: dict[asyncio.Task[None], None] = {}
        self._retry: asyncio.TimerHandle | None = None
        bound.setblocking(False)
        bound.listen(backlog)
        self._loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Accepts nobody any more, and sends those away who have not been let in."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()
        for visitor in list(self._visitors):
            visitor.close()

    async def wait_closed(self) -> None:
        """Returns when no connection is on its way to the event loop."""
        await asyncio.gather(*self._opening, return_exceptions=True)

    def gate(self, parsed: _Request) -> Gate | None:
        """Where a request has to pass."""
        scope = http_scope(parsed.method, parsed.url, "1.1", parsed.headers)
        return self._app.gate(scope)

    def open(self, visitor: _Visitor, kept: Arrival | None) -> None:
        """Makes it one of the event loop's connections."""
        self._visitors.pop(visitor, None)
        self._open(visitor.socket, visitor.caller, kept)

    def forget(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor, None)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_A_TURN):
            try:
                one, _ = self._bound.accept()
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
                self._open(one, None, None)
            else:
                visitor = _Visitor(one, self)
                self._visitors[visitor] = None
                visitor.arrive(crowded)

    def _open(self, one: socket.socket, caller: Caller | None, kept: Arrival | None) -> None:
        task = self._loop.create_task(self._opened(one, caller, kept))
        self._opening[task] = None
        task.add_done_callback(self._opening.pop)

    async def _opened(self, one: socket.socket, caller: Caller | None, kept: Arrival | None) -> None:
        one.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(partial(self._connect, caller, kept), one)
        except OSError as error:
            _logger.info("a connection is lost before its first request: %s", error)
            one.close()
            if kept is not None:
                kept.settle()


class _Sight(enum.Enum):
    """What a look at a connection may find beside a request for a language model."""

    GONE = enum.auto()
    SILENT = enum.auto()
    OTHER = enum.auto()


class _Asked(NamedTuple):
    """A request for a language model. Attributes: size: of the whole request, which is here; 0: it is not yet."""

    gate: Gate
    size: int
    body: int
    keep_alive: bool


class _Request:
    """What the parser tells of the first request of a connection."""

    __slots__ = ("_parser", "begun", "body", "complete", "headers", "keep_alive", "method", "url", "version")

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self.keep_alive = False
        self.version = ""
        self.method = ""
        self.url = b""
        self.headers: list[Header] = []
        self.body = 0
        self.begun = 0
        self.complete = False

    def on_message_begin(self) -> None:
        self.begun += 1

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self.method, self.version = parser.get_method().decode("ascii"), parser.get_http_version()
        self.keep_alive = parser.should_keep_alive()

    def on_body(self, chunk: bytes) -> None:
        self.body += len(chunk)

    def on_message_complete(self) -> None:
        self.complete = True

    def parse(self, data: bytes) -> bool:
        """Whether that is well."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return False
        finally:
            self._parser = None  # it refers back to this object
        return True


class _Visitor:
    """A connection that has not been let in."""

    __slots__ = ("_acceptor", "_seen", "_sight", "_waited", "caller", "socket")

    def __init__(self, one: socket.socket, acceptor: Acceptor) -> None:
        self.socket = one
        self.caller = Caller(self.turn, cost=0.0)
        self._acceptor = acceptor
        self._seen = 0
        self._sight: _Sight | _Asked = _Sight.SILENT
        self._waited = False

    def arrive(self, crowded: Admission) -> None:
        """It is new. Args: crowded: a model that takes nobody now."""
        sight = self._look()
        if sight is _Sight.GONE or sight is _Sight.OTHER:
            self._deal(sight, crowded)
            return
        line = sight.gate.admission if isinstance(sight, _Asked) else crowded
        if not line.came(self.caller):
            self._take_turn(line)

    def turn(self, offered: bool) -> bool:
        """See `Caller`."""
        line = self.caller.met
        assert line is not None
        return self._take_turn(line)

    def close(self) -> None:
        self.caller.leave()
        self._acceptor.forget(self)
        self.socket.close()

    def _take_turn(self, line: Admission) -> bool:
        began = time.thread_time()  # of this process alone: others may be busy too
        used = self._deal(self._look(), line)
        line.spent(time.thread_time() - began)
        return used

    def _deal(self, sight: _Sight | _Asked, line: Admission) -> bool:
        """Does what there is to do; whether a place is taken."""
        if sight is _Sight.GONE:
            self.close()
        elif sight is _Sight.SILENT and not self._waited:
            self._waited = True
            line.rest(self.caller, SILENCE)
        elif not isinstance(sight, _Asked) or not sight.size:
            self._acceptor.open(self, None)
        elif not sight.gate.admission.full:
            self._acceptor.open(self, Arrival(sight.gate.admission))
            return True
        else:
            self._refuse(sight)
        return False

    def _refuse(self, asked: _Asked) -> None:
        gate = asked.gate
        refusal = gate.refusal(asked.body, self.caller)
        if refusal is None:  # a matter of its body
            self._acceptor.open(self, None)
            return
        head = response_head(refusal.status, refusal.headers, len(refusal.body), asked.keep_alive)
        answer = head + refusal.body
        try:
            whole = self.socket.send(answer, _SEND) == len(answer)
            self.socket.recv(asked.size, socket.MSG_DONTWAIT)
        except OSError:
            whole = False
        self._seen, self._waited = 0, False
        if not whole or not asked.keep_alive:
            self.close()
        elif not gate.admission.refused(self.caller, fault=refusal is gate.too_large):
            self._acceptor.open(self, None)

    def _look(self) -> _Sight | _Asked:
        """What is here, which stays unread."""
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
        if not request.complete and any(name == b"expect" for name, _ in request.headers):
            return _Sight.OTHER
        gate = self._acceptor.gate(request)
        if gate is None or gate.overloaded is None:
            return _Sight.OTHER
        size = len(data) if request.complete else 0
        return _Asked(gate, size, request.body, request.keep_alive)
