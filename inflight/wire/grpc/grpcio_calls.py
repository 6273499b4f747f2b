"""gRPC calls on grpc's C core: the application's procedures over the core's operations.

The core does HTTP/2, compression, deadlines and the limit of received messages. A call consists of operations, each of
which ends with one event: its end (or cancellation), awaited from the start, one message at a time, and the reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from grpc._cython import cygrpc

from inflight.admission import Arrival, Caller, arrival
from inflight.errors import OVERLOADED
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.completions import Completions
from inflight.wire.grpc.messages import check_reply
from inflight.wire.grpc.rpc import Reply, Rpc, StreamRpc, UnaryRpc, close_replies, parse, peer
from inflight.wire.grpc.status import (
    INTERNAL,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    GrpcError,
    short_message,
    status_of,
    unknown_method,
)

MAX_CALLS = 16_384
"""Calls that may be open at once. For a further one, the call that has waited longest for its caller is cut; if
handlers run for all of them, the new one is refused."""
READ_TIMEOUT = 100.0
"""Seconds for a call's one request."""
WRITE_TIMEOUT = 60.0
"""Seconds for a caller to receive the end of its call, plus a second for every `MIN_RATE` bytes of it."""
MIN_RATE = 64 * 1024
MAX_WAITING = 256 << 20
"""Bytes of replies that may wait for one connection, or four of the largest messages."""
_LARGE = 64 * 1024
"""Smaller replies are bounded by `MAX_CALLS`."""
_ASKED = 64
"""Calls that the core may hand over before it is asked for more."""
_AFTER_DEADLINE = 0.02
"""Seconds after a call's deadline at which its handler may time out: the core must end the call first."""
_FOREVER = 1e12
_SWEEP = 10.0


class Calls:
    """All calls of one server."""

    def __init__(self, app: GrpcApp) -> None:
        self.running: dict[Call, None] = {}
        """Calls whose handlers run, or that are held."""
        self.idle: dict[Call, None] = {}
        """Calls that wait for their callers to send the request or to receive the end."""
        self.held = 0
        """Number of calls that wait for their turn at a language model."""
        self.stopping = False
        self.loop = asyncio.get_running_loop()
        self._app = app
        self._rpcs: dict[bytes, tuple[str, Rpc]] = {path.encode(): (path, rpc) for path, rpc in app.rpcs.items()}
        self._max_waiting = max(MAX_WAITING, 4 * app.max_message_bytes)
        self._waiting: dict[bytes, int] = {}
        self._sweeping: asyncio.TimerHandle | None = None
        self._server: Any = None
        self._queue: Any = None

    def serve(self, server: Any, completions: Completions) -> None:
        """Begins to take the calls of a started server."""
        self._server, self._queue = server, completions.queue
        for _ in range(_ASKED):
            self.ask()

    def ask(self) -> None:
        """Asks the core for one more call."""
        if not self.stopping:
            self._server.request_call(self._queue, self._queue, self._begin)

    def stop(self) -> None:
        """Takes no further call. Running work goes on; calls that only wait for a further request end."""
        self.stopping = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        for call in list(self.running):
            if call.resting:
                call.stop()

    def forget(self) -> None:
        """Drops the server, so that its descriptors are closed without waiting for the garbage collector."""
        self._server = self._queue = None

    def reserve(self, call: Any, size: int) -> bytes | None:
        """Counts a large reply as waiting for its caller. Returns the argument `peer` of `release`; None: not counted.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, the caller has not read its earlier replies.
        """
        if size < _LARGE:
            return None
        name: bytes = call.peer()
        if name.startswith(b"unix"):  # all callers have the same name
            return None
        waiting = self._waiting.get(name, 0)
        if waiting and waiting + size > self._max_waiting:
            raise GrpcError(RESOURCE_EXHAUSTED, f"{waiting} bytes of replies wait, read them before sending more")
        self._waiting[name] = waiting + size
        return name

    def checked(self, reply: Reply) -> bytes:
        """A reply's bytes, within the limit.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, it is over the limit.
        """
        data = reply.SerializeToString()
        check_reply(len(data), self._app.max_message_bytes)
        return data

    def release(self, peer: bytes, size: int) -> None:
        """Uncounts a reply that was sent."""
        self._waiting[peer] -= size
        if not self._waiting[peer]:
            del self._waiting[peer]

    def _begin(self, event: Any) -> None:
        """Serves a new call of the core."""
        if not event.success:  # the server stops
            return
        self.ask()
        details = event.call_details
        path, rpc = self._rpcs.get(details.method, (None, None))
        call = Call(self, event.call, path or details.method.decode(errors="replace"))
        if self._sweeping is None and not self.stopping:
            self._sweeping = self.loop.call_later(_SWEEP, self._sweep)
        if path is None or rpc is None:
            call.refuse(unknown_method(call.path))
        else:
            try:
                rpc = self._admitted(path, rpc, event.invocation_metadata)
            except GrpcError as status:
                call.refuse(status)
            else:
                call.start(rpc, details.deadline)

    def _admitted(self, path: str, rpc: Rpc, metadata: Any) -> Rpc:
        """The procedure for this caller.

        Raises:
            GrpcError: the call is refused.
        """
        if len(self.running) + len(self.idle) >= MAX_CALLS:
            longest = next(iter(self.idle), None)
            if longest is None:
                raise GrpcError(RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are open, more are not taken; try again later")
            longest.cut()
        if not self._app.needs_key:
            return rpc
        key = next((value for name, value in metadata or () if name == "authorization"), None)
        return self._app.admitted(path, rpc, key.encode() if isinstance(key, str) else key)

    def _sweep(self) -> None:
        """Cuts the calls that have waited too long for their callers."""
        now = self.loop.time()
        for call in [call for call in self.idle if call.due < now]:
            call.cut()
        self._sweeping = self.loop.call_later(_SWEEP, self._sweep) if self.idle else None


class Call:
    """One call.

    Attributes:
        path: of its method.
        resting: it waits for the next request of a stream.
        held: it waits for its turn at a language model.
        due: loop time until which it may wait for its caller.
        task: its handler's task, while that runs.
    """

    __slots__ = (
        "_call",
        "_calls",
        "_data",
        "_deadline",
        "_ended",
        "_kept",
        "_lost",
        "_parsed",
        "_rpc",
        "_started",
        "due",
        "held",
        "path",
        "resting",
        "task",
    )

    def __init__(self, calls: Calls, call: Any, path: str) -> None:
        self.path = path
        self.resting = False
        self.due = 0.0
        self.task: asyncio.Task[None] | None = None
        self.held: Caller | None = None
        self._calls = calls
        self._call = call
        self._data: bytes | None = b""
        self._parsed: Any = None
        self._kept: Arrival | None = None
        self._rpc: Any = None
        self._deadline = _FOREVER
        self._started = False
        self._ended = False  # its end has been sent
        self._lost = False  # it has ended in the core
        call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._closed)

    def start(self, rpc: Rpc, deadline: float) -> None:
        """Begins to serve the call.

        Args:
            deadline: Unix time.
        """
        self._rpc = rpc
        self._deadline = deadline
        if isinstance(rpc, StreamRpc) and rpc.duplex is not None:
            self._run(b"")
        else:
            self._wait(READ_TIMEOUT)
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._arrived)

    def refuse(self, status: GrpcError) -> None:
        """Ends the call with a status, unless its end has been sent already."""
        if not self._ended:
            more = tuple((name.decode(), value.decode()) for name, value in status.headers)
            self._end((), status.code, short_message(str(status)).encode(), trailers=more or None)

    def stop(self) -> None:
        """Cancels its handler, or its wait for a turn."""
        if self.task is not None:
            self.task.cancel()
        elif self.held is not None:
            self.held.leave()
            self._let_go()
            self.refuse(_stopping())

    def cut(self) -> None:
        """Ends the call because it waits too long for its caller."""
        self._calls.idle.pop(self, None)
        self._call.cancel()

    def _wait(self, seconds: float) -> None:
        self.due = self._calls.loop.time() + seconds
        self._calls.idle[self] = None

    # Called with the core's events

    def _closed(self, event: Any) -> None:
        """The call has ended in the core: it was answered, its caller left, or its time is up."""
        self._calls.idle.pop(self, None)
        if event.batch_operations[0].cancelled():
            self._lost = True
            self.stop()

    def _arrived(self, event: Any) -> None:
        """The call's one request has been received, or will not come."""
        self._calls.idle.pop(self, None)
        data = event.batch_operations[0].message()
        if data is None or self._lost:
            self.refuse(GrpcError(INTERNAL, "the request holds no message"))
        elif not self._hold(data):
            self._run(data if self._parsed is None else b"")  # a long generation must not keep a large message

    def _hold(self, data: bytes) -> bool:
        """Makes the call wait for its turn if it must. Returns True if it waits or has been refused."""
        rpc = self._rpc
        if not isinstance(rpc, UnaryRpc) or rpc.hold is None:
            return False
        try:
            self._parsed = parse(rpc, data)
        except GrpcError as error:
            self.refuse(error)
            return True
        self.held = rpc.hold(self._parsed, self._call.peer, self._turn)
        if self.held is None:
            return False
        self._calls.held += 1
        self._calls.running[self] = None
        return True

    def _turn(self, kept: Arrival | None) -> None:
        """Serves or refuses the call at its turn. Args: kept: the place reserved for it; None: refuse it."""
        request = self._parsed
        self._let_go()
        if kept is not None:
            self._parsed, self._kept = request, kept
            token = arrival.set(kept)
            self._run(b"")
            arrival.reset(token)
        elif self._rpc.refusal is None:
            self._end((), RESOURCE_EXHAUSTED, _OVERLOADED)
        else:
            reply = self._rpc.refusal(request).SerializeToString()
            self._end((cygrpc.SendMessageOperation(reply, 0),), OK, b"", len(reply))

    def _let_go(self) -> None:
        """The call waits no longer for its turn."""
        self._calls.held -= 1
        self.held = self._parsed = None
        self._calls.running.pop(self, None)

    def _sent(self, _event: Any) -> None:
        """The core has sent the end of the call. The caller may not have received it yet."""
        self._calls.idle.pop(self, None)

    # The handler

    def _run(self, data: bytes) -> None:
        self._calls.running[self] = None
        self._data = data
        self.task = self._calls.loop.create_task(self._handle())
        self.task.add_done_callback(self._handled)

    def _handled(self, task: asyncio.Task[None]) -> None:
        self.task = None
        del self._calls.running[self]
        if self._kept is not None:
            self._kept.settle()
        if task.cancelled():  # the caller left, its time is over, or the server stops
            self.refuse(_stopping())

    def _request(self, rpc: Rpc) -> Any:
        """The call's parsed request; its bytes are dropped."""
        if self._parsed is not None:
            request, self._parsed = self._parsed, None
            return request
        data, self._data = self._data, b""
        assert data is not None
        return parse(rpc, data)

    async def _handle(self) -> None:
        """Runs the handler; its errors become statuses."""
        peer.set(self._call.peer)
        try:
            if isinstance(self._rpc, UnaryRpc):
                await self._answer(self._rpc)
            else:
                await self._answer_stream(self._rpc)
        except Exception as error:
            self.refuse(status_of(error, self.path))

    async def _answer(self, rpc: UnaryRpc) -> None:
        reply = self._calls.checked(await rpc.handler(self._request(rpc), self._timeout()))
        peer = self._calls.reserve(self._call, len(reply))
        self._end((cygrpc.SendMessageOperation(reply, 0),), OK, b"", len(reply), peer)

    async def _answer_stream(self, rpc: StreamRpc) -> None:
        if rpc.duplex is not None:
            replies = rpc.duplex(self._requests(rpc), self._timeout())
        else:
            assert rpc.handler is not None
            replies = rpc.handler(self._request(rpc), self._timeout())
        try:
            self._started = True
            self._call.start_server_batch((cygrpc.SendInitialMetadataOperation(None, 0),), _ignore)
            async for reply in replies:
                await self._write(self._calls.checked(reply))
        finally:
            await close_replies(replies)
        self._end((), OK, b"")

    async def _requests(self, rpc: StreamRpc) -> AsyncIterator[Any]:
        """The messages of a stream of requests, each read when the handler asks for it; none once the server stops."""
        while not self._calls.stopping:
            self.resting = True
            read = cygrpc.ReceiveMessageOperation(0)
            await self._done(read)
            self.resting = False
            self._data = read.message()
            del read
            if self._data is None:
                return
            yield self._request(rpc)  # no variable keeps the message while it is being answered
        raise _stopping()

    async def _write(self, data: bytes) -> None:
        """Waits for the caller's window."""
        if not await self._done(cygrpc.SendMessageOperation(data, 0)):  # the call ended meanwhile
            raise asyncio.CancelledError

    async def _done(self, operation: Any) -> bool:
        """Begins an operation and waits for its end; returns whether it succeeded."""
        future: asyncio.Future[bool] = self._calls.loop.create_future()

        def done(event: Any) -> None:  # which knows `done`: kept in the future, all would wait for the collector
            if not future.done():
                future.set_result(event.success)

        self._call.start_server_batch((operation,), done)
        return await future

    def _end(
        self,
        before: tuple[Any, ...],
        code: int,
        text: bytes,
        size: int = 0,
        peer: bytes | None = None,
        trailers: tuple[tuple[str, str], ...] | None = None,
    ) -> None:
        """Sends the operations `before` and the call's status as one batch."""
        self._ended = True
        self._wait(WRITE_TIMEOUT + size / MIN_RATE)
        head = () if self._started else (cygrpc.SendInitialMetadataOperation(None, 0),)
        batch = (*head, *before, cygrpc.SendStatusFromServerOperation(trailers, code, text, 0))
        if peer is None:
            self._call.start_server_batch(batch, self._sent)
            return
        calls = self._calls

        def sent(event: Any) -> None:
            calls.release(peer, size)
            self._sent(event)

        self._call.start_server_batch(batch, sent)

    def _timeout(self) -> float | None:
        """The caller's time-out for a handler, in seconds."""
        if self._deadline > _FOREVER:
            return None
        return max(self._deadline - time.time(), 0.0) + _AFTER_DEADLINE


_OVERLOADED = OVERLOADED.encode()


def _ignore(_event: Any) -> None:
    pass


def _stopping() -> GrpcError:
    return GrpcError(UNAVAILABLE, "the server is stopping")
