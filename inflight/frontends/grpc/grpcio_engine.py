"""The gRPC door on grpcio's C core, where zttp is not installed or not wanted. Only this module imports grpc.

The core does HTTP/2, TLS, compression, deadlines and the limit of received messages; procedures and statuses are those
of the ASGI application. Some of the core's habits are not a server's here (grpcio 1.85):

- it joins whoever listens on a port, and of the addresses that a host name has it is content with one. Here the
  addresses are bound once before it is asked;
- it unlinks the file of a unix socket before it binds and when it stops, whoever made it. Here the core's socket has
  a name of its own, and is then renamed to the one that was asked for;
- it closes channels that send keep-alive pings oftener than every five minutes;
- it stops the whole server when a caller names a method that is not UTF-8. Here the door opens again at once;
- it leaves a unary call that ends without a message unanswered. Here every request is read as a stream.

Two are left as they are: 0.0.0.0 and [::] both mean all addresses of both families, and a POST of any content type is
read as a call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from inflight.config import TlsConfig
from inflight.frontends.address import GRPC, UNIX, Address
from inflight.frontends.grpc.asgi import GrpcApp
from inflight.frontends.grpc.framing import check_reply
from inflight.frontends.grpc.rpc import Rpc, StreamRpc, UnaryRpc, close, parse
from inflight.frontends.grpc.status import INTERNAL, UNAVAILABLE, GrpcError, short_message, status_of, unknown_method
from inflight.frontends.sockets import SocketFile, bind_tcp, bind_unix, cannot_start

_DISCONNECT = 1.0
"""Seconds that a handler has to end by itself once its call is cut."""
_AFTER_DEADLINE = 0.02
"""Seconds after a call's deadline at which its handler may give up by itself."""
_A_DAY = 86_400.0
_TURN = 0.01
_logger = logging.getLogger("inflight.grpc")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioListener:
    """A `Listener` over grpcio's server. Make it with `listen_grpcio`."""

    def __init__(self, app: GrpcApp, address: Address, tls: TlsConfig | None, options: list[tuple[str, int]]) -> None:
        self.address = str(address)
        self._where = address
        self._calls = _Calls(app)
        self._tls = tls
        self._options = options
        self._server: Any = None
        self._file: SocketFile | None = None
        self._leaving: dict[asyncio.Task[None], Any] = {}
        self._reopening: asyncio.Task[None] | None = None
        self._stopping = False

    async def open(self) -> None:
        """Begins to accept.

        Raises:
            OSError, UnicodeError, RuntimeError: the address cannot be bound.
        """
        names = await _check_free(self._where)
        server = grpc.aio.server(handlers=(self._calls,), options=self._options)
        add_port = _port_opener(server, self._tls)
        if self._where.path is not None:
            self._file = _open_unix(self._where.path, add_port)
        else:
            self._where = _open_tcp(self._where, names, add_port)
        self.address = str(self._where)
        before = asyncio.all_tasks()
        await server.start()
        self._server = server
        for task in asyncio.all_tasks() - before:  # grpcio's own, which nobody else is told of
            task.add_done_callback(self._look)

    async def close(self, grace: float) -> None:
        """As `Listener` says."""
        self._stopping = True
        if self._reopening is not None:
            await asyncio.wait({self._reopening})
        if self._file is not None:
            self._file.remove()
        if self._server is None:
            return
        servers = [self._server, *self._leaving.values()]
        self._calls.stop()
        stopping = [asyncio.ensure_future(server.stop(grace)) for server in servers] + [*self._leaving]
        del servers
        await asyncio.wait(stopping, timeout=grace + _DISCONNECT)
        running = self._calls.running
        if running:  # the core has cancelled them
            await asyncio.wait(list(running), timeout=_DISCONNECT)
        for task in list(running):
            task.cancel()
        await asyncio.gather(*stopping, *running, return_exceptions=True)
        self._server = None  # it must not outlive the loop

    def forget(self) -> None:
        """As `Listener` says."""
        if self._file is not None:
            self._file.remove()

    def _look(self, task: asyncio.Task[Any]) -> None:
        """Opens the door again where grpcio has given up; the calls in flight run to their end meanwhile."""
        if not self._stopping and not task.cancelled() and isinstance(task.exception(), UnicodeDecodeError):
            leaving = asyncio.ensure_future(self._server.stop(_A_DAY))
            self._leaving[leaving] = self._server
            leaving.add_done_callback(self._leaving.pop)
            self._reopening = asyncio.ensure_future(self._reopen())

    async def _reopen(self) -> None:
        while not self._stopping:
            try:
                await self.open()
            except (OSError, RuntimeError):  # the old server's socket is still there
                await asyncio.sleep(_TURN)
            else:
                _logger.warning("a call of a method whose name is not UTF-8 ended grpcio's server; a new one listens")
                return


async def listen_grpcio(
    app: GrpcApp, address: Address, tls: TlsConfig | None, first_byte_timeout: float
) -> GrpcioListener:
    """Serves the application's procedures.

    Args:
        tls: its files have been checked.

    Raises:
        StartError: the address cannot be bound, with MindSpore Serving's text.
    """
    listener = GrpcioListener(app, address, tls, _options(app.max_message_bytes, first_byte_timeout))
    try:
        await listener.open()
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: grpcio's own
        failure = cannot_start(GRPC, address, error)
    else:
        return listener
    raise failure  # here, since the error holds grpcio's server, which must not outlive the loop


def _options(max_message_bytes: int, first_byte_timeout: float) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),  # checked here, where the text is ours
        ("grpc.server_handshake_timeout_ms", round(first_byte_timeout * 1000)),
        ("grpc.http2.max_ping_strikes", 0),  # clients may ping as they like
        ("grpc.keepalive_permit_without_calls", 1),  # every two hours: finds the peers that are gone
    ]


def _port_opener(server: Any, tls: TlsConfig | None) -> Callable[[str], int]:
    if tls is None:
        return server.add_insecure_port  # type: ignore[no-any-return]
    pair = (Path(tls.private_key).read_bytes(), Path(tls.certificate).read_bytes())
    ca = Path(tls.custom_ca).read_bytes() if tls.verify_client and tls.custom_ca is not None else None
    credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
    return lambda address: server.add_secure_port(address, credentials)


async def _check_free(address: Address) -> list[str]:
    """Binds an address and lets it go: the error tells why it cannot be had, which grpcio's does not.

    Returns:
        The addresses of the host.
    """
    if address.path is not None:
        bind_unix(address.path).close()
        os.unlink(address.path)
        return []
    names = []
    for bound in await bind_tcp(address):
        names.append(bound.getsockname()[0])
        bound.close()
    return names


def _open_tcp(address: Address, names: list[str], add_port: Callable[[str], int]) -> Address:
    port = address.port
    for name in names:
        port = add_port(str(Address(name, port)))
    return Address(address.host, port)


def _open_unix(path: str, add_port: Callable[[str], int]) -> SocketFile:
    own = os.path.join(os.path.dirname(path), f".{secrets.token_hex(3)}")
    add_port(UNIX + own)
    os.rename(own, path)
    return SocketFile(Path(path))


class _Calls:
    """The application's procedures as grpcio looks them up: a generic handler.

    Attributes:
        running: the tasks of the calls that run.
    """

    def __init__(self, app: GrpcApp) -> None:
        self.running: set[asyncio.Task[Any]] = set()
        self._resting: set[asyncio.Task[Any]] = set()  # those that wait for a request
        self._stopping = False
        self._app = app
        self._limit = app.max_message_bytes
        self._handlers: dict[str, Any] = {}
        for path, rpc in app.rpcs.items():
            if isinstance(rpc, UnaryRpc):
                self._handlers[path] = grpc.stream_unary_rpc_method_handler(self._guarded(path, self._unary(rpc)))
            else:
                self._handlers[path] = grpc.stream_stream_rpc_method_handler(self._guarded(path, self._stream(rpc)))

    def service(self, details: Any) -> Any:
        """The handler of one call; for what is not offered one that says so."""
        path: str = details.method
        key = next((value for name, value in details.invocation_metadata or () if name == "authorization"), None)
        status = self._app.refuses(path, key.encode() if isinstance(key, str) else key)
        if status is not None:
            return self._refusal(path, status)
        return self._handlers.get(path) or self._refusal(path)

    def stop(self) -> None:
        """What runs goes on, what only waits for more to do ends."""
        self._stopping = True
        for task in self._resting:
            task.cancel()

    def _refusal(self, path: str, status: GrpcError | None = None) -> Any:
        async def refuse(_context: Any) -> None:
            raise status or unknown_method(path)

        return grpc.stream_stream_rpc_method_handler(self._guarded(path, refuse))

    def _guarded(self, path: str, work: Callable[[Any], Awaitable[bytes | None]]) -> Any:
        """A handler whose errors become statuses. It is cancelled when its caller leaves or the time is over."""

        async def handle(_requests: Any, context: Any) -> bytes | None:
            task = asyncio.current_task()
            assert task is not None
            self.running.add(task)
            task.add_done_callback(self.running.discard)
            try:
                return await work(context)
            except grpc.aio.BaseError:  # the call ended while a message was on its way
                raise asyncio.CancelledError from None
            except asyncio.CancelledError:
                if not self._stopping or task not in self._resting:
                    raise
                status = _stopping()
            except Exception as error:
                status = status_of(error, path)
            finally:
                self._resting.discard(task)
            await _fail(context, status)
            return None

        return handle

    def _unary(self, rpc: UnaryRpc) -> Callable[[Any], Awaitable[bytes]]:
        async def answer(context: Any) -> bytes:
            return self._sent(await rpc.handler(await _single(rpc, context), _timeout(context)))

        return answer

    def _stream(self, rpc: StreamRpc) -> Callable[[Any], Awaitable[None]]:
        async def answer(context: Any) -> None:
            if rpc.duplex is not None:
                replies = rpc.duplex(self._requests(rpc, context), _timeout(context))
            else:
                assert rpc.handler is not None
                replies = rpc.handler(await _single(rpc, context), _timeout(context))
            try:
                await context.send_initial_metadata(())
                async for reply in replies:
                    await context.write(self._sent(reply))  # waits for the caller's window
            finally:
                await close(replies)

        return answer

    async def _requests(self, rpc: StreamRpc, context: Any) -> AsyncIterator[Message]:
        """The messages of a stream of requests, each read only when it is asked for; none once the server stops."""
        task = asyncio.current_task()
        assert task is not None
        while not self._stopping:
            self._resting.add(task)
            data = await context.read()
            self._resting.discard(task)
            if data is grpc.aio.EOF:
                return
            yield parse(rpc, data)
        raise _stopping()

    def _sent(self, reply: Message) -> bytes:
        data = reply.SerializeToString()
        check_reply(len(data), self._limit)
        return data


async def _fail(context: Any, status: GrpcError) -> None:
    """Ends a call; raises what tells grpcio that it has ended."""
    try:
        await context.abort(_CODES[status.code], short_message(str(status)))
    except grpc.aio.InternalError:  # the core has ended it already
        raise asyncio.CancelledError from None


async def _single(rpc: Rpc, context: Any) -> Message:
    """The request's only message."""
    data = await context.read()
    if data is grpc.aio.EOF:
        raise GrpcError(INTERNAL, "the request holds no message")
    return parse(rpc, data)


def _timeout(context: Any) -> float | None:
    """The caller's time-out for a handler. The core ends the call at its deadline: it must come first."""
    left = context.time_remaining()
    return None if left is None else left + _AFTER_DEADLINE


def _stopping() -> GrpcError:
    return GrpcError(UNAVAILABLE, "the server is stopping")
