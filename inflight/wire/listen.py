"""Listeners: serve an application at an address, with TLS, from start to stop."""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import logging
import socket
import ssl
import struct
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from inflight.admission import Arrival, Caller
from inflight.config import GRPC_ENGINES, ListenConfig
from inflight.errors import ConfigError, StartError
from inflight.wire.address import GRPC, RESTFUL, Address, Kind, parse_address
from inflight.wire.connections import Allocate, Connection, HttpLimits, OpenConnections
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.http.acceptor import Acceptor
from inflight.wire.http.asgi import App
from inflight.wire.http.connection import HttpConnection
from inflight.wire.http.gate import GatedApp
from inflight.wire.sockets import SocketFile, bind_tcp, bind_unix, cannot_start
from inflight.wire.tls import server_context

log = logging.getLogger("inflight.grpc")

BACKLOG = 2048
_TLS_HANDSHAKE_TIMEOUT = 20.0
_TLS_GOODBYE = 0.25
"""Seconds for an idle TLS client to answer the closing alert before it is cut."""
STALLED = 5.0
"""Seconds without a byte taken by a client, after which a listener that stops cuts it."""
_DISCONNECT = 1.0
"""Seconds that an application has to end by itself once its client is cut."""
_TURN = 0.01
_NGHTTP2 = "inflight.wire.grpc.nghttp2_engine"


class Listener(Protocol):
    """Accepts connections from its creation until `close`.

    Attributes:
        address: as configured, with the real port in place of 0.
    """

    address: str

    async def close(self, grace: float) -> None:
        """Stops accepting, closes idle connections, lets requests in flight finish, then cuts the rest.

        A client that takes no byte of its answer for `STALLED` seconds is cut before the grace is over.
        No connection, task or socket file is left when it returns. Calling it again does nothing.

        Args:
            grace: seconds for the requests in flight.
        """

    def forget(self) -> None:
        """Removes the socket's file, if any, before the process exits at once. May be called from any thread."""


class Accepting(Protocol):
    """Accepts connections at one socket: a server of the event loop, or an `Acceptor`."""

    def close(self) -> None:
        """Stops accepting connections."""

    async def wait_closed(self) -> None:
        """Returns when every accepted connection has been handed over or closed."""


class SocketListener:
    """A `Listener` over the servers or acceptors of its sockets."""

    def __init__(
        self, address: Address, servers: list[Accepting], shared: OpenConnections, file: SocketFile | None
    ) -> None:
        self.address = str(address)
        self._servers = servers
        self._shared = shared
        self._file = file

    async def close(self, grace: float) -> None:
        """As `Listener` says."""
        shared = self._shared
        shared.stopping = True
        for server in self._servers:
            server.close()
        if self._file is not None:
            self._file.remove()
        for connection in list(shared.connections):
            connection.shutdown()
        watch = _StallWatch(shared)
        await _wait_while(lambda: watch.busy() or bool(shared.tasks), grace)
        await _wait_while(lambda: any(not connection.busy() for connection in shared.connections), _TLS_GOODBYE)
        for connection in list(shared.connections):
            connection.transport.abort()  # the applications see a disconnect
        await _wait_while(lambda: bool(shared.connections or shared.tasks), _DISCONNECT)
        for task in list(shared.tasks):
            task.cancel()
        await asyncio.gather(*shared.tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers = []

    def forget(self) -> None:
        """As `Listener` says."""
        if self._file is not None:
            self._file.remove()


class _StallWatch:
    """Cuts connections whose clients do not read, while a listener stops."""

    def __init__(self, shared: OpenConnections) -> None:
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Connection, tuple[int, float]] = {}  # unsent bytes, and since when their number is the same
        self._looked = 0.0

    def busy(self) -> bool:
        """Whether a connection has a request in flight. Cuts those whose clients have stalled."""
        now = self._loop.time()
        if now - self._looked >= STALLED / 10:
            self._looked = now
            self._look(now)
        return any(connection.busy() for connection in self._shared.connections)

    def _look(self, now: float) -> None:
        before, self._waiting = self._waiting, {}
        for connection in list(self._shared.connections):
            size = _unsent(connection.transport)
            if not size:
                continue
            old_size, since = before.get(connection, (size, now))
            self._waiting[connection] = size, (since if size == old_size else now)
            if size == old_size and now - since >= STALLED:
                connection.transport.abort()


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes that wait for a client, the kernel's included; 0 if the kernel has taken all."""
    size = transport.get_write_buffer_size()
    peer = transport.get_extra_info("socket") if size else None
    if peer is None or transport.is_closing():
        return size
    try:
        queued = fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:  # not supported for this kind of socket
        return size
    return size + int(struct.unpack("i", queued)[0])


async def _wait_while(busy: Callable[[], bool], seconds: float) -> None:
    """Returns when `busy` is false or `seconds` are over. Polls, because only a listener that stops needs it."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    await asyncio.sleep(0)  # closed transports report it in the loop's next turn
    while busy() and loop.time() < until:
        await asyncio.sleep(min(_TURN, until - loop.time()))


def success_line(kind: Kind, address: str) -> str:
    """The line that is logged once the server listens, in MindSpore Serving's words: scripts wait for it."""
    name = "Serving RESTful" if kind == RESTFUL else kind
    return f"{name} server start success, listening on {address}"


async def listen_http(
    app: App, config: ListenConfig, *, limits: HttpLimits | None = None, allocate: Allocate | None = None
) -> SocketListener:
    """Serves an ASGI application over HTTP/1.1, with TLS if configured.

    Args:
        limits: replaces the default limits and the configuration's size limit.
        allocate: allocates the buffers of large bodies, for instance in shared memory.

    Raises:
        ConfigError: the address or a TLS file is wrong.
        StartError: the address cannot be bound.
    """
    address = parse_address(config.address, RESTFUL, any_port=True)
    tls = server_context(config.tls, "http/1.1") if config.tls else None
    bounds = limits or HttpLimits(max_body_bytes=config.max_message_mb << 20)
    if allocate is not None:
        bounds = replace(bounds, allocate=allocate)
    shared = OpenConnections()
    loop = asyncio.get_running_loop()

    def connect(caller: Caller | None = None, kept: Arrival | None = None) -> HttpConnection:
        return HttpConnection(app, shared, loop, bounds, caller, kept)

    accept = None
    if tls is None and hasattr(app, "gate"):
        gated = cast(GatedApp, app)

        def accept(bound: socket.socket) -> Acceptor:
            return Acceptor(bound, BACKLOG, gated, connect, shared.lingering)

    return await _listen(RESTFUL, address, tls, shared, connect, accept)


async def listen_grpc(
    app: GrpcApp,
    config: ListenConfig,
    *,
    engine: str = "auto",
    first_byte_timeout: float = 100.0,
    allocate: Allocate | None = None,
) -> Listener:
    """Serves gRPC calls over HTTP/2: prior knowledge, or ALPN `h2` over TLS.

    Args:
        engine: the HTTP/2 implementation, one of `inflight.config.GRPC_ENGINES`.
        first_byte_timeout: seconds after which a peer that has sent nothing is cut.
        allocate: allocates the buffers of large messages, for instance in shared memory. grpcio has its own.

    Raises:
        ConfigError: the address or the engine is wrong.
        StartError: the address cannot be bound, a TLS file is wrong, or the engine is not installed.
    """
    address = parse_address(config.address, GRPC, any_port=True)
    try:
        tls = server_context(config.tls, "h2") if config.tls else None
    except RuntimeError as error:
        raise cannot_start(GRPC, address, error) from None
    engine = _engine(engine)
    if engine == "grpcio":
        from inflight.wire.grpc.grpcio_engine import listen_grpcio

        return await listen_grpcio(app, address, config.tls, first_byte_timeout)
    from inflight.wire.grpc.nghttp2_engine import Door, Nghttp2Connection

    shared = OpenConnections()
    door = Door(app, shared, asyncio.get_running_loop(), first_byte_timeout, allocate)
    return await _listen(GRPC, address, tls, shared, lambda: Nghttp2Connection(door))


def auto_engine() -> str:
    """The engine of `auto`: `nghttp2` if the package was built with it, else `grpcio`."""
    try:
        importlib.import_module(_NGHTTP2)
    except ImportError as error:
        log.info("the gRPC door uses grpcio, since nghttp2 cannot be imported: %s", error)
        return "grpcio"
    return "nghttp2"


def _engine(wanted: str) -> str:
    """The engine to use.

    Raises:
        ConfigError: `wanted` is not the name of an engine.
        StartError: the engine cannot be imported.
    """
    if wanted not in GRPC_ENGINES:
        raise ConfigError(f"the gRPC engine '{wanted}' is not known, use one of: {', '.join(GRPC_ENGINES)}")
    if wanted == "auto":
        return auto_engine()
    if wanted == "nghttp2":
        try:
            importlib.import_module(_NGHTTP2)
        except ImportError as error:
            raise StartError(
                f"Serving Error: {GRPC} server start failed, the engine nghttp2 cannot be imported: {error}; install "
                "Debian's libnghttp2-dev (nghttp2-devel or libnghttp2 elsewhere) and then this package again, or use "
                "the engine grpcio"
            ) from None
    return wanted


async def _listen(
    kind: Kind,
    address: Address,
    tls: ssl.SSLContext | None,
    shared: OpenConnections,
    protocol: Callable[[], asyncio.BaseProtocol],
    accept: Callable[[socket.socket], Acceptor] | None = None,
) -> SocketListener:
    loop = asyncio.get_running_loop()
    timeout = _TLS_HANDSHAKE_TIMEOUT if tls else None
    file = None
    try:
        if address.path is not None:
            sockets = [bind_unix(address.path)]
            file = SocketFile(Path(address.path))
        else:
            sockets = await bind_tcp(address)
            address = Address(address.host, sockets[0].getsockname()[1])
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        raise cannot_start(kind, address, error) from None
    servers: list[Accepting] = []
    for bound in sockets:
        server: Accepting
        if accept is not None:
            server = accept(bound)
        elif address.path is not None:
            server = await loop.create_unix_server(
                protocol, sock=bound, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=timeout
            )
        else:
            server = await loop.create_server(
                protocol, sock=bound, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=timeout
            )
        servers.append(server)
    return SocketListener(address, servers, shared, file)
