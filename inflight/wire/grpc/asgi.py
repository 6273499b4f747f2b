"""gRPC over HTTP/2 as an ASGI application: registry, deadlines, cancellation, sizes, statuses.

The connection below (`GrpcProtocol`) puts a `Stream` into the scope's extensions. Through it a call ends when its
caller leaves, and a stream of replies waits for a slow reader; without one (another ASGI server) calls run to their
end. Replies are not compressed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Protocol

from google.protobuf.message import Message

from inflight.wire.access import authorized
from inflight.wire.grpc.framing import (
    Framed,
    MessageReader,
    check_encoding,
    check_reply,
    opened,
    prefix,
    single,
)
from inflight.wire.grpc.rpc import Rpc, StreamRpc, UnaryRpc, close, parse, peer
from inflight.wire.grpc.status import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    OK,
    UNAUTHENTICATED,
    UNAVAILABLE,
    GrpcError,
    parse_timeout,
    status_of,
    status_trailers,
    unknown_method,
)
from inflight.wire.http.asgi import Receive, Scope, Send

STREAM_EXTENSION = "inflight.stream"
_JOINED = 64 * 1024
"""Up to this size prefix and message are joined into one DATA frame."""
_CONTENT_TYPE = (b"content-type", b"application/grpc")
_START = {"type": "http.response.start", "status": 200, "headers": [_CONTENT_TYPE], "trailers": True}
_NO_BODY = {"type": "http.response.body", "body": b"", "more_body": False}
_TRAILERS_OK = {"type": "http.response.trailers", "headers": status_trailers(OK)}


class Stream(Protocol):
    """One call's HTTP/2 stream, as its connection shows it.

    Attributes:
        closed: the caller has left; nothing that is sent arrives.
        stopping: the server stops; a stream of requests takes no further one.
        resting: it waits for the next one of a stream of requests, so there is nothing to finish.
        task: cancelled when the caller leaves, or when the server stops while the stream rests.
    """

    closed: bool
    stopping: bool
    resting: bool
    task: asyncio.Task[Any] | None

    def peer(self) -> object:
        """Names the connection."""

    def reserve(self, size: int) -> None:
        """A reply of so many bytes is about to be sent.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, too much waits for a caller that does not read.
        """

    async def drain(self) -> None:
        """Waits until the caller has taken most of what was sent.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, too much waits for a caller that goes on sending without reading.
        """


class _Detached:
    """The stream of a server that shows none."""

    def peer(self) -> object:
        return None

    closed = False
    stopping = False
    resting = False
    task: asyncio.Task[Any] | None = None

    def reserve(self, size: int) -> None:
        pass

    async def drain(self) -> None:
        pass


class GrpcApp:
    """An ASGI application that answers gRPC calls. Engines of their own framing serve its procedures directly.

    Attributes:
        rpcs: by path, `/package.Service/Method`.
        max_message_bytes: of one message, either way, after decompression.
    """

    def __init__(
        self,
        rpcs: Mapping[str, Rpc],
        *,
        max_message_bytes: int,
        api_key: str | None = None,
        secured: Collection[str] = (),
    ) -> None:
        """Args: secured: paths that only callers with the key may call."""
        self.rpcs = dict(rpcs)
        self.max_message_bytes = max_message_bytes
        self._api_key = api_key
        self._secured = frozenset(secured)

    @property
    def needs_key(self) -> bool:
        """Whether some calls need a key."""
        return self._api_key is not None

    def refuses(self, path: str, authorization: bytes | None) -> GrpcError | None:
        """The status for a caller without the key."""
        if self._api_key is None or path not in self._secured or authorized(self._api_key, authorization):
            return None
        return GrpcError(
            UNAUTHENTICATED, "this server needs its API key: send the metadata authorization: Bearer <key>"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refusal = _http_refusal(scope["method"], headers.get(b"content-type", b""))
        if refusal is not None:
            await _answer_http(send, refusal)
            return
        if b"te" not in headers:  # some proxies drop it; the server below sends trailers only where it is
            scope["headers"].append((b"te", b"trailers"))
        stream: Stream = scope.get("extensions", {}).get(STREAM_EXTENSION) or _Detached()
        if stream.closed:
            return
        call = _Call(receive, send, stream, headers, self.max_message_bytes)
        status = self.refuses(scope["path"], headers.get(b"authorization"))
        if status is None:
            status = await self._run(call, scope["path"], stream, headers.get(b"grpc-timeout"))
        if status is not None and not stream.closed:
            await call.fail(status)

    async def _run(self, call: _Call, path: str, stream: Stream, timeout: bytes | None) -> GrpcError | None:
        """Runs one call to its reply. Gives the status to end it with where that is not sent yet."""
        deadline = _NO_DEADLINE
        stream.task = asyncio.current_task()
        peer.set(stream.peer)
        try:
            if timeout is not None:
                deadline = _Deadline(parse_timeout(timeout))
            rpc = self.rpcs.get(path)
            if isinstance(rpc, UnaryRpc):
                await call.unary(rpc, deadline)
            elif rpc is not None:
                await call.streaming(rpc, deadline)
            else:
                return unknown_method(path)
        except asyncio.CancelledError:
            return deadline.reason()
        except Exception as error:
            return status_of(error, path)
        finally:
            stream.task = None
            deadline.cancel()
        return None


class _Call:
    """One call: reads its messages, runs its handler, writes its replies."""

    __slots__ = ("_encoding", "_ended", "_limit", "_receive", "_send", "_started", "_stream")

    def __init__(self, receive: Receive, send: Send, stream: Stream, headers: dict[bytes, bytes], limit: int) -> None:
        self._receive = receive
        self._send = send
        self._stream = stream
        self._encoding = headers.get(b"grpc-encoding", b"identity")
        self._limit = limit
        self._started = False
        self._ended = False

    async def unary(self, rpc: UnaryRpc, deadline: _Deadline) -> None:
        request = self._parsed(rpc, await self._single())
        reply = (await rpc.handler(await request, deadline.seconds)).SerializeToString()
        deadline.cancel()
        send = self._send
        body = self._framed(reply)
        self._stream.reserve(len(reply))
        self._started = True
        await send(_START)
        for part in body[:-1]:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        self._ended = True
        await send({"type": "http.response.body", "body": body[-1], "more_body": False})
        await send(_TRAILERS_OK)

    async def streaming(self, rpc: StreamRpc, deadline: _Deadline) -> None:
        if rpc.duplex is not None:
            replies = rpc.duplex(self._requests(rpc), deadline.seconds)
        else:
            assert rpc.handler is not None
            replies = rpc.handler(await self._parsed(rpc, await self._single()), deadline.seconds)
        try:
            self._started = True
            await self._send(_START)
            async for reply in replies:
                for part in self._framed(reply.SerializeToString()):
                    await self._send({"type": "http.response.body", "body": part, "more_body": True})
                await self._stream.drain()
        finally:
            await close(replies)
        deadline.cancel()
        self._ended = True
        await self._send(_NO_BODY)
        await self._send(_TRAILERS_OK)

    async def fail(self, status: GrpcError) -> None:
        """Ends the call with a status, unless its end is already on its way."""
        if self._ended:
            return
        if not self._started:
            await self._send(_START | {"headers": [_CONTENT_TYPE, *status.headers]} if status.headers else _START)
        await self._send(_NO_BODY)
        await self._send({"type": "http.response.trailers", "headers": status_trailers(status.code, str(status))})

    async def _single(self) -> Framed:
        """The request's only message; nothing over the limit is buffered."""
        check_encoding(self._encoding)
        body, more = await self._chunk()
        if not more:
            return single(body, self._limit)
        reader = MessageReader(self._limit)
        reader.feed(body)
        while more:
            body, more = await self._chunk()
            reader.feed(body)
        framed = reader.take()
        reader.finish()
        if framed is None:
            raise GrpcError(INTERNAL, "the request holds no message")
        return framed

    async def _requests(self, rpc: StreamRpc) -> AsyncIterator[Message]:
        """The messages of a stream of requests, each read only when it is asked for."""
        check_encoding(self._encoding)
        reader = MessageReader(self._limit)
        more = True
        while True:
            framed = reader.take()
            if framed is not None:
                parsed = [await self._parsed(rpc, framed)]
                del framed
                yield parsed.pop()  # in no variable: this waits until the request is answered
            elif more:
                if self._stream.stopping:
                    raise GrpcError(UNAVAILABLE, "the server is stopping")
                self._stream.resting = True
                body, more = await self._chunk()
                self._stream.resting = False
                reader.feed(body)
            else:
                reader.finish()
                return

    async def _chunk(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] != "http.request":
            raise GrpcError(CANCELLED, "the caller left")
        return message["body"], message["more_body"]

    async def _parsed(self, rpc: Rpc, framed: Framed) -> Message:
        data = await opened(framed, self._encoding, self._limit) if framed.compressed else framed.data
        return parse(rpc, data)

    def _framed(self, reply: bytes) -> tuple[bytes, ...]:
        """A reply with its prefix, in one or two parts."""
        check_reply(len(reply), self._limit)
        return (prefix(reply) + reply,) if len(reply) <= _JOINED else (prefix(reply), reply)


class _Deadline:
    """Cancels the task that made it when the caller's time is over."""

    __slots__ = ("_expired", "_timer", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None
        if seconds is not None:
            task = asyncio.current_task()
            assert task is not None
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, task)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def reason(self) -> GrpcError:
        """Status of a call that was cancelled while its caller waited."""
        if self._expired:
            return GrpcError(DEADLINE_EXCEEDED, "Deadline Exceeded")
        return GrpcError(UNAVAILABLE, "the server is stopping")

    def _expire(self, task: asyncio.Task[Any]) -> None:
        self._expired = True
        task.cancel()


_NO_DEADLINE = _Deadline(None)


def _http_refusal(method: str, content_type: bytes) -> int | None:
    """The HTTP status for what is no gRPC call."""
    if method != "POST":
        return 405
    if content_type != b"application/grpc" and not content_type.startswith(
        (b"application/grpc+proto", b"application/grpc;")
    ):
        return 415
    return None


async def _answer_http(send: Send, status: int) -> None:
    allow = [(b"allow", b"POST")] if status == 405 else []
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0"), *allow]})
    await send(_NO_BODY)
