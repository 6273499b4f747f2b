"""gRPC calls of one HTTP/2 connection under nghttp2: the application's procedures over a session's events.

A `Call` runs its handler as a task. A `QuickCall` needs none, since its procedure calls back: as `Call`s the same calls
take 1.30 times the CPU time of the server's process (the request of the row "add, gRPC, 64 connections" of
`bench.classic`, each way in turn, the median of three rounds of 2 s). A `HeldCall` waits for its turn at a language
model, and becomes a `Call` then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

from inflight.admission import Arrival, Caller, arrival
from inflight.errors import OVERLOADED
from inflight.wire import _http2
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.messages import Framed, check_encoding, check_reply, opened
from inflight.wire.grpc.rpc import Begin, Encoded, Hold, Reply, Rpc, StreamRpc, UnaryRpc, close_replies, parse, peer
from inflight.wire.grpc.status import (
    DEADLINE_EXCEEDED,
    INTERNAL,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    GrpcError,
    encode_message,
    status_of,
)

HIGH_WATER = 256 * 1024
"""Bytes of replies that may wait for one stream's window before its handler does."""


class Connection(Protocol):
    """The connection of a call.

    Attributes:
        stopping: streams of requests take no further request.
        calls: the calls that are being served or held, by stream.
    """

    session: _http2.Session
    app: GrpcApp
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[None]]
    stopping: bool
    calls: dict[int, Call | QuickCall | HeldCall]

    def name(self) -> object:
        """A key that no other connection has."""

    def flush(self) -> None:
        """Sends the session's bytes at the end of the loop's turn."""


class Head(NamedTuple):
    """A call as its headers describe it.

    Attributes:
        deadline: loop time at which the caller gives up.
        encoding: `grpc-encoding` if it is not identity.
    """

    path: str
    rpc: Rpc
    deadline: float | None
    encoding: bytes | None


def serve(connection: Connection, stream: int, head: Head, framed: Framed | None) -> None:
    """Serves a call in the cheapest way that its procedure allows.

    Args:
        framed: its one request message; None for a stream of requests.
    """
    rpc, request = head.rpc, None
    if isinstance(rpc, UnaryRpc) and framed is not None and not framed.compressed and head.encoding is None:
        try:
            request = parse(rpc, framed.data)
        except GrpcError as error:
            refuse(connection, stream, error)
            return
        framed = None
        if rpc.begin is not None and QuickCall(connection, stream, head).begin(rpc.begin, request):
            return
        if rpc.hold is not None and HeldCall(connection, stream, head, rpc).hold(rpc.hold, request):
            return
    Call(connection, stream, head, framed, request)


class QuickCall:
    """One call that is answered by a callback."""

    __slots__ = ("_cancel", "_connection", "_expiry", "_head", "_over", "_stream")

    def __init__(self, connection: Connection, stream: int, head: Head) -> None:
        self._connection = connection
        self._stream = stream
        self._head = head
        self._cancel: Callable[[], None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self, begin: Begin, request: Any) -> bool:
        """Begins the work. Returns False if a `Call` must serve the request."""
        connection, deadline = self._connection, self._head.deadline
        if deadline is not None:
            self._expiry = connection.loop.call_at(deadline, self._expire)
        try:
            cancel = begin(request, seconds_left(connection, deadline), self._done)
        except Exception as error:  # becomes a status, as in `Call`
            self._done(error)
            return True
        if cancel is None:
            self._end()
            return False
        if not self._over:
            self._cancel = cancel
            connection.calls[self._stream] = self
        return True

    def cancel(self) -> None:
        """Cancels the work: the caller has left."""
        self._end()
        if self._cancel is not None:
            self._cancel()

    def stop(self) -> None:
        """Does nothing: a server that stops waits for the answer."""

    def _done(self, result: Reply | Exception) -> None:
        if self._over:
            return
        self._end()
        connection = self._connection
        try:
            if isinstance(result, Exception):
                raise result
            answer(connection, self._stream, result)
        except Exception as error:
            refuse(connection, self._stream, status_of(error, self._head.path))

    def _expire(self) -> None:
        self.cancel()
        refuse(self._connection, self._stream, too_late())

    def _end(self) -> None:
        self._over = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._connection.calls.pop(self._stream, None)


class HeldCall:
    """One call that waits for its turn at a language model."""

    __slots__ = ("_caller", "_connection", "_expiry", "_head", "_request", "_rpc", "_stream")

    def __init__(self, connection: Connection, stream: int, head: Head, rpc: UnaryRpc) -> None:
        self._connection = connection
        self._stream = stream
        self._head = head
        self._rpc = rpc
        self._request: Any = None
        self._caller: Caller | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def hold(self, hold: Hold, request: Any) -> bool:
        """Puts the call in line. Returns False if it need not wait."""
        connection = self._connection
        self._caller = hold(request, connection.name, self._turn)
        if self._caller is None:
            return False
        self._request = request
        connection.calls[self._stream] = self
        if self._head.deadline is not None:
            self._expiry = connection.loop.call_at(self._head.deadline, self._leave, too_late())
        return True

    def cancel(self) -> None:
        """Leaves the line: the caller has left."""
        if self._caller is not None:
            self._caller.leave()
        self._end()

    def stop(self) -> None:
        """Ends the call: the server stops before its turn."""
        self._leave(stopping())

    def _leave(self, status: GrpcError) -> None:
        self.cancel()
        refuse(self._connection, self._stream, status)

    def _turn(self, kept: Arrival | None) -> None:
        """Serves or refuses the call at its turn. Args: kept: the place reserved for it; None: refuse it."""
        request, connection = self._request, self._connection
        self._end()
        assert request is not None
        if kept is not None:
            token = arrival.set(kept)
            Call(connection, self._stream, self._head, None, request, kept)
            arrival.reset(token)
        elif self._rpc.refusal is None:
            refuse(connection, self._stream, GrpcError(RESOURCE_EXHAUSTED, OVERLOADED))
        else:
            answer(connection, self._stream, self._rpc.refusal(request))

    def _end(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._request = None
        self._connection.calls.pop(self._stream, None)


class Call:
    """One call whose handler runs as a task."""

    __slots__ = (
        "_connection",
        "_expired",
        "_framed",
        "_head",
        "_inbox",
        "_kept",
        "_news",
        "_parsed",
        "_room",
        "_started",
        "_stream",
        "_task",
        "_timer",
    )

    def __init__(
        self,
        connection: Connection,
        stream: int,
        head: Head,
        framed: Framed | None,
        parsed: Any,
        kept: Arrival | None = None,
    ) -> None:
        """Args:
        framed: its one request message, unless it is given as `parsed`; both are None for a stream of requests.
        kept: the place at a language model that was reserved for it.
        """
        self._connection = connection
        self._stream = stream
        self._head = head
        self._framed = framed
        self._parsed = parsed
        self._kept = kept
        self._inbox: deque[Framed | GrpcError | None] | None = None
        self._news: asyncio.Future[None] | None = None  # awaited by the handler for the next request of a stream
        self._room: asyncio.Future[None] | None = None  # awaited by the handler until the caller has taken replies
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._started = False
        connection.calls[stream] = self
        self._task = connection.loop.create_task(self._run())
        connection.tasks.add(self._task)

    # Called by the connection

    def put(self, item: Framed | GrpcError | None) -> None:
        """Takes the next request of a stream, the error that ends it, or None for its end."""
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append(item)
        _wake(self._news)

    def drained(self) -> None:
        """Wakes the handler: the caller has taken most of the replies."""
        _wake(self._room)

    def stop(self) -> None:
        """The server stops. Running work goes on; a call that only waits for a further request ends."""
        if self._news is not None:
            self.cancel()

    def cancel(self) -> None:
        """Cancels the handler: the caller has left."""
        self._task.cancel()
        if not self._started:  # a task cancelled before its start runs no code at all
            self._forget()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._kept is not None:
            self._kept.settle()
        self._connection.calls.pop(self._stream, None)
        self._connection.tasks.discard(self._task)

    # The handler

    async def _run(self) -> None:
        """Runs the handler; its errors become statuses."""
        self._started = True
        head, connection = self._head, self._connection
        peer.set(connection.name)
        try:
            seconds = seconds_left(connection, head.deadline)
            if head.deadline is not None:
                self._timer = connection.loop.call_at(head.deadline, self._expire)
            if isinstance(head.rpc, UnaryRpc):
                request = await self._request()
                work = head.rpc.handler(request, seconds)
                del request  # frees its memory: the work may take long
                answer(connection, self._stream, await work)
            else:
                await self._answer_stream(head.rpc, seconds)
        except asyncio.CancelledError:  # the caller left, its time is over, or the server stops
            refuse(connection, self._stream, too_late() if self._expired else stopping())
        except Exception as error:
            refuse(connection, self._stream, status_of(error, head.path))
        finally:
            self._forget()

    async def _answer_stream(self, rpc: StreamRpc, seconds: float | None) -> None:
        connection, session = self._connection, self._connection.session
        if rpc.duplex is not None:
            replies = rpc.duplex(self._requests(), seconds)
        else:
            assert rpc.handler is not None
            replies = rpc.handler(await self._request(), seconds)
        try:
            session.begin(self._stream)
            self._connection.flush()
            async for reply in replies:
                waiting = session.send(self._stream, checked(connection, reply))
                self._connection.flush()
                if waiting > HIGH_WATER:
                    self._room = self._connection.loop.create_future()
                    await self._room
        finally:
            await close_replies(replies)
        session.finish(self._stream, OK, b"", [])
        self._connection.flush()

    async def _requests(self) -> AsyncIterator[Any]:
        """The messages of a stream of requests, each decompressed only when the handler asks for it."""
        if self._head.encoding is not None:
            check_encoding(self._head.encoding)
        if self._inbox is None:
            self._inbox = deque()
        while True:
            if self._connection.stopping and not self._inbox:
                raise stopping()
            if not self._inbox:
                self._news = self._connection.loop.create_future()
                try:
                    await self._news
                finally:
                    self._news = None
            item = self._inbox.popleft()
            if item is None:
                return
            if isinstance(item, GrpcError):
                raise item
            self._connection.session.took(self._stream, len(item.data))
            self._connection.flush()
            self._framed = item
            del item
            parsed = [await self._request()]
            yield parsed.pop()  # no variable keeps the message while it is being answered

    async def _request(self) -> Any:
        """The received message, which this call then no longer keeps."""
        framed, self._framed = self._framed, None
        parsed, self._parsed = self._parsed, None
        if parsed is not None:
            return parsed
        assert framed is not None
        encoding = self._head.encoding
        if encoding is not None:
            check_encoding(encoding)
        data = framed.data
        if framed.compressed:
            data = await opened(framed, encoding or b"identity", self._connection.app.max_message_bytes)
        return parse(self._head.rpc, data)

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


def checked(connection: Connection, reply: Reply) -> bytes | list[bytes | memoryview]:
    """A reply's bytes, or their parts, within the limit.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit.
    """
    if isinstance(reply, Encoded):
        check_reply(reply.size, connection.app.max_message_bytes)
        return reply.parts
    data = reply.SerializeToString()
    check_reply(len(data), connection.app.max_message_bytes)
    return data


def answer(connection: Connection, stream: int, reply: Reply) -> None:
    """Sends the whole answer of a call.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit, or too much waits for a caller that does not read.
    """
    if not connection.session.reply(stream, checked(connection, reply)):
        waiting = connection.session.waiting
        raise GrpcError(RESOURCE_EXHAUSTED, f"{waiting} bytes of replies wait, read them before sending more")
    connection.flush()


def refuse(connection: Connection, stream: int, status: GrpcError) -> None:
    """Ends a call with a status, unless its end has been sent already."""
    headers = [(name.decode(), value.decode()) for name, value in status.headers]
    connection.session.finish(stream, status.code, encode_message(str(status)), headers)
    connection.flush()


def seconds_left(connection: Connection, deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - connection.loop.time(), 0.0)


def too_late() -> GrpcError:
    return GrpcError(DEADLINE_EXCEEDED, "Deadline Exceeded")


def stopping() -> GrpcError:
    return GrpcError(UNAVAILABLE, "the server is stopping")


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def fault(what: int, first: int, second: int) -> GrpcError:
    """The status of a request that cannot be read."""
    if what == _http2.TOO_LARGE:
        return GrpcError(RESOURCE_EXHAUSTED, f"SERVER: Received message larger than max ({first} vs. {second})")
    if what == _http2.TOO_MUCH:
        text = f"{first} bytes of requests wait on this connection, send more when some of them are answered"
        return GrpcError(RESOURCE_EXHAUSTED, text)
    if what == _http2.FLAGS:
        text = f"a message begins with the unknown flags {first}, they must be 0 or 1"
    elif what == _http2.CUT:
        text = f"the request ended in the middle of a message, {first} bytes of it came"
    elif what == _http2.SECOND:
        text = "the request must be exactly one message, a second one came"
    else:
        text = "the request holds no message"
    return GrpcError(INTERNAL, text)
