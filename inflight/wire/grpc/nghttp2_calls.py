"""gRPC calls of one HTTP/2 connection under nghttp2: the application's procedures over a session's events.

A `Call` runs its handler as a task. A `QuickCall` needs none: its procedure calls back, which costs half as much.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from inflight.wire import _http2
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.messages import Framed, check_encoding, check_reply, opened
from inflight.wire.grpc.rpc import Rpc, StreamRpc, UnaryRpc, close, parse, peer
from inflight.wire.grpc.status import (
    DEADLINE_EXCEEDED,
    INTERNAL,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    GrpcError,
    encode_message,
    parse_timeout,
    status_of,
)

HIGH_WATER = 256 * 1024
"""Bytes of replies that may wait for one stream's window before its handler does."""


class Connection(Protocol):
    """The connection of a call.

    Attributes:
        stopping: a stream of requests takes no further one.
        calls: those whose handlers run, by their streams.
    """

    session: _http2.Session
    app: GrpcApp
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[None]]
    stopping: bool
    calls: dict[int, Call | QuickCall]

    def name(self) -> object:
        """Tells the connection from others."""

    def flush(self) -> None:
        """What the session has to send goes out at the end of the loop's turn."""


class Head(NamedTuple):
    """What is known of a call before its message.

    Attributes:
        timeout: `grpc-timeout` as it came.
        encoding: `grpc-encoding` where it is not identity.
        key: `authorization`, where the application has a key.
    """

    path: str
    rpc: Rpc
    timeout: bytes | None
    encoding: bytes | None
    key: bytes | None


class QuickCall:
    """One call that is answered by a callback."""

    __slots__ = ("_cancel", "_connection", "_expiry", "_over", "_path", "_stream")

    def __init__(self, connection: Connection, stream: int, path: str) -> None:
        self._connection = connection
        self._stream = stream
        self._path = path
        self._cancel: Callable[[], None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._over = False

    def begin(self, rpc: Rpc, framed: Framed, timeout: bytes | None) -> bool:
        """Begins the work. False where it is for a `Call`."""
        if not isinstance(rpc, UnaryRpc) or rpc.begin is None or framed.compressed:
            return False
        connection = self._connection
        seconds = None
        try:
            if timeout is not None:
                seconds = parse_timeout(timeout)
                self._expiry = connection.loop.call_later(seconds, self._expire)
            cancel = rpc.begin(parse(rpc, framed.data), seconds, self._done)
        except Exception as error:  # as a task's
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
        """The caller has left."""
        self._end()
        if self._cancel is not None:
            self._cancel()

    def stop(self) -> None:
        """The server stops, and waits for it."""

    def _done(self, result: Message | Exception) -> None:
        if self._over:
            return
        self._end()
        connection = self._connection
        try:
            if isinstance(result, Exception):
                raise result
            answer(connection, self._stream, result)
        except Exception as error:
            refuse(connection, self._stream, status_of(error, self._path))

    def _expire(self) -> None:
        self.cancel()
        refuse(self._connection, self._stream, GrpcError(DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _end(self) -> None:
        self._over = True
        if self._expiry is not None:
            self._expiry.cancel()
        self._connection.calls.pop(self._stream, None)


class Call:
    """One call whose handler runs as a task."""

    __slots__ = (
        "_connection",
        "_expired",
        "_framed",
        "_head",
        "_inbox",
        "_news",
        "_room",
        "_started",
        "_stream",
        "_task",
        "_timer",
    )

    def __init__(self, connection: Connection, stream: int, head: Head, framed: Framed | None) -> None:
        """Args: framed: its one message; None for a stream of them."""
        self._connection = connection
        self._stream = stream
        self._head = head
        self._framed = framed
        self._inbox: deque[Framed | GrpcError | None] | None = None
        self._news: asyncio.Future[None] | None = None  # it waits for the next of a stream of requests
        self._room: asyncio.Future[None] | None = None  # it waits until the caller has taken replies
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._started = False
        connection.calls[stream] = self
        self._task = connection.loop.create_task(self._run())
        connection.tasks.add(self._task)

    # What the connection tells

    def put(self, item: Framed | GrpcError | None) -> None:
        """The next of a stream of requests, why there is none, or None for its end."""
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append(item)
        _wake(self._news)

    def drained(self) -> None:
        """The caller has taken most of the replies."""
        _wake(self._room)

    def stop(self) -> None:
        """The server stops: what runs goes on, what only waits for a further request ends."""
        if self._news is not None:
            self.cancel()

    def cancel(self) -> None:
        """The caller has left."""
        self._task.cancel()
        if not self._started:  # then not a line of it runs
            self._forget()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._connection.calls.pop(self._stream, None)
        self._connection.tasks.discard(self._task)

    # The handler

    async def _run(self) -> None:
        """The handler; its errors become statuses."""
        self._started = True
        head, connection = self._head, self._connection
        peer.set(connection.name)
        try:
            seconds = None
            if head.timeout is not None:
                seconds = parse_timeout(head.timeout)
                self._timer = connection.loop.call_later(seconds, self._expire)
            if isinstance(head.rpc, UnaryRpc):
                request = await self._request(self._taken())
                work = head.rpc.handler(request, seconds)
                del request  # the work has what it needs, and may take long
                answer(connection, self._stream, await work)
            else:
                await self._answer_stream(head.rpc, seconds)
        except asyncio.CancelledError:  # the caller left, its time is over, or the server stops
            late = self._expired
            refuse(connection, self._stream, GrpcError(DEADLINE_EXCEEDED, "Deadline Exceeded") if late else stopping())
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
            replies = rpc.handler(await self._request(self._taken()), seconds)
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
            await close(replies)
        session.finish(self._stream, OK, b"", [])
        self._connection.flush()

    async def _requests(self) -> AsyncIterator[Message]:
        """The messages of a stream of requests, each opened only when it is asked for."""
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
            parsed = [await self._request(self._taken())]
            yield parsed.pop()  # in no variable: this waits until the request is answered

    def _taken(self) -> Framed:
        """The message's bytes, which are kept no longer."""
        framed, self._framed = self._framed, None
        assert framed is not None
        return framed

    async def _request(self, framed: Framed) -> Message:
        encoding = self._head.encoding
        if encoding is not None:
            check_encoding(encoding)
        if framed.compressed:
            data = await opened(framed, encoding or b"identity", self._connection.app.max_message_bytes)
            return parse(self._head.rpc, data)
        return parse(self._head.rpc, framed.data)

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()


def checked(connection: Connection, reply: Message) -> bytes:
    """A reply's bytes.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit.
    """
    data = reply.SerializeToString()
    check_reply(len(data), connection.app.max_message_bytes)
    return data


def answer(connection: Connection, stream: int, reply: Message) -> None:
    """Sends the whole answer of a call.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit, or too much waits for a caller that does not read.
    """
    if not connection.session.reply(stream, checked(connection, reply)):
        waiting = connection.session.waiting
        raise GrpcError(RESOURCE_EXHAUSTED, f"{waiting} bytes of replies wait, read them before sending more")
    connection.flush()


def refuse(connection: Connection, stream: int, status: GrpcError) -> None:
    """Ends a call with a status, unless its end is on its way."""
    headers = [(name.decode(), value.decode()) for name, value in status.headers]
    connection.session.finish(stream, status.code, encode_message(str(status)), headers)
    connection.flush()


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
