"""The gRPC door on grpcio's C core, where zttp is not installed or not wanted. Only this module imports grpc.

The core does HTTP/2, TLS, compression, deadlines and the limit of received messages; procedures and statuses are those
of the ASGI application. Some of the core's habits are not a server's here (grpcio 1.85):

- it joins whoever listens on a port, and of the addresses that a host name has it is content with one. Here the
  addresses are bound once before it is asked;
- it unlinks the file of a unix socket before it binds and when it stops, whoever made it. Here the core's socket has
  a name of its own, and is then renamed to the one that was asked for;
- it closes channels that send keep-alive pings oftener than every five minutes.
"""

from __future__ import annotations

import asyncio
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
from inflight.frontends.grpc.rpc import StreamRpc, UnaryRpc, close, parse
from inflight.frontends.grpc.status import short_message, status_of, unknown_method
from inflight.frontends.sockets import SocketFile, bind_tcp, bind_unix, cannot_start

_DISCONNECT = 1.0
"""Seconds that a handler has to end by itself once its call is cut."""
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioListener:
    """A `Listener` over a started grpcio server."""

    def __init__(self, address: Address, server: Any, calls: _Calls, file: SocketFile | None) -> None:
        self.address = str(address)
        self._server = server
        self._calls = calls
        self._file = file

    async def close(self, grace: float) -> None:
        """As `Listener` says."""
        if self._file is not None:
            self._file.remove()
        stopping = asyncio.ensure_future(self._server.stop(grace))
        await asyncio.wait({stopping}, timeout=grace + _DISCONNECT)
        for task in list(self._calls.running):
            task.cancel()
        await stopping
        await asyncio.gather(*self._calls.running, return_exceptions=True)


async def listen_grpcio(
    app: GrpcApp, address: Address, tls: TlsConfig | None, first_byte_timeout: float
) -> GrpcioListener:
    """Serves the application's procedures.

    Args:
        tls: its files have been checked.

    Raises:
        StartError: the address cannot be bound, with MindSpore Serving's text.
    """
    calls = _Calls(app)
    server = grpc.aio.server(handlers=(calls,), options=_options(app.max_message_bytes, first_byte_timeout))
    try:
        add_port = _port_opener(server, tls)
        if address.path is not None:
            file: SocketFile | None = _open_unix(address.path, add_port)
        else:
            file = None
            address = await _open_tcp(address, add_port)
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: grpcio's own
        raise cannot_start(GRPC, address, error) from None
    await server.start()
    return GrpcioListener(address, server, calls, file)


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


async def _open_tcp(address: Address, add_port: Callable[[str], int]) -> Address:
    names = []
    for bound in await bind_tcp(address):  # tells why an address cannot be had, which grpcio does not
        names.append(bound.getsockname()[0])
        bound.close()
    port = address.port
    for name in names:
        port = add_port(str(Address(name, port)))
    return Address(address.host, port)


def _open_unix(path: str, add_port: Callable[[str], int]) -> SocketFile:
    bind_unix(path).close()
    os.unlink(path)
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
        self._limit = app.max_message_bytes
        self._handlers: dict[str, Any] = {}
        for path, rpc in app.rpcs.items():
            if isinstance(rpc, UnaryRpc):
                self._handlers[path] = grpc.unary_unary_rpc_method_handler(self._guarded(path, self._unary(rpc)))
            elif rpc.duplex is not None:
                self._handlers[path] = grpc.stream_stream_rpc_method_handler(self._guarded(path, self._stream(rpc)))
            else:
                self._handlers[path] = grpc.unary_stream_rpc_method_handler(self._guarded(path, self._stream(rpc)))

    def service(self, details: Any) -> Any:
        """The handler of one call; for what is not offered one that says so."""
        path: str = details.method
        return self._handlers.get(path) or self._refusal(path)

    def _refusal(self, path: str) -> Any:
        async def refuse(_request: Any, _context: Any) -> None:
            raise unknown_method(path)

        return grpc.stream_stream_rpc_method_handler(self._guarded(path, refuse))

    def _guarded(self, path: str, work: Callable[[Any, Any], Awaitable[bytes | None]]) -> Any:
        """A handler whose errors become statuses. It is cancelled when its caller leaves or the time is over."""

        async def handle(request: Any, context: Any) -> bytes | None:
            task = asyncio.current_task()
            assert task is not None
            self.running.add(task)
            task.add_done_callback(self.running.discard)
            try:
                return await work(request, context)
            except Exception as error:
                status = status_of(error, path)
            return await context.abort(_CODES[status.code], short_message(str(status)))  # type: ignore[no-any-return]

        return handle

    def _unary(self, rpc: UnaryRpc) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def answer(request: bytes, context: Any) -> bytes:
            return self._sent(await rpc.handler(parse(rpc, request), context.time_remaining()))

        return answer

    def _stream(self, rpc: StreamRpc) -> Callable[[Any, Any], Awaitable[None]]:
        async def answer(request: Any, context: Any) -> None:
            if rpc.duplex is not None:
                replies = rpc.duplex(_requests(rpc, context), context.time_remaining())
            else:
                assert rpc.handler is not None
                replies = rpc.handler(parse(rpc, request), context.time_remaining())
            try:
                await context.send_initial_metadata(())
                async for reply in replies:
                    await context.write(self._sent(reply))  # waits for the caller's window
            finally:
                await close(replies)

        return answer

    def _sent(self, reply: Message) -> bytes:
        data = reply.SerializeToString()
        check_reply(len(data), self._limit)
        return data


async def _requests(rpc: StreamRpc, context: Any) -> AsyncIterator[Message]:
    """The messages of a stream of requests, each read only when it is asked for."""
    while (data := await context.read()) is not grpc.aio.EOF:
        yield parse(rpc, data)
