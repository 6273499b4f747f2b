"""Listening sockets: addresses, TLS, unix sockets, start and stop. The words of the errors are MindSpore Serving's."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from inflight.config import ListenConfig
from inflight.errors import StartError
from inflight.frontends.address import GRPC, RESTFUL, Address, Kind, parse_address
from inflight.frontends.asgi import App
from inflight.frontends.connections import Allocate, HttpLimits, OpenConnections
from inflight.frontends.http1 import HttpConnection
from inflight.frontends.http2 import Http2Connection, http2_config
from inflight.frontends.tls import server_context

BACKLOG = 2048
_TLS_HANDSHAKE_TIMEOUT = 20.0
_TLS_GOODBYE = 0.25
"""Seconds that an idle TLS client has to answer the goodbye before it is cut."""
_DISCONNECT = 1.0
"""Seconds that an application has to end by itself once its client is cut."""
_TURN = 0.01


class Listener:
    """Accepts connections from its making until `close`.

    Attributes:
        address: as it was asked for, with the real port where that was 0.
    """

    def __init__(
        self, address: Address, servers: list[asyncio.Server], shared: OpenConnections, file: SocketFile | None
    ) -> None:
        self.address = str(address)
        self._servers = servers
        self._shared = shared
        self._file = file

    async def close(self, grace: float) -> None:
        """Stops accepting, closes idle connections, lets requests in flight finish, then cuts what is left.

        No connection, task or socket file is left when it returns. Calling it again does nothing.

        Args:
            grace: seconds for the requests in flight.
        """
        shared = self._shared
        shared.stopping = True
        for server in self._servers:
            server.close()
        if self._file is not None:
            self._file.remove()
        for connection in list(shared.connections):
            connection.shutdown()
        await _wait_while(lambda: bool(shared.tasks) or any(each.busy() for each in shared.connections), grace)
        await _wait_while(lambda: any(not each.busy() for each in shared.connections), _TLS_GOODBYE)
        for connection in list(shared.connections):
            connection.transport.abort()  # the applications see a disconnect
        await _wait_while(lambda: bool(shared.connections or shared.tasks), _DISCONNECT)
        for task in list(shared.tasks):
            task.cancel()
        await asyncio.gather(*shared.tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers = []


async def _wait_while(busy: Callable[[], bool], seconds: float) -> None:
    """Returns when nothing is busy any more, or the time is over. Looks often, but only while a listener stops."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    await asyncio.sleep(0)  # closed transports say so in the loop's next turn
    while busy() and loop.time() < until:
        await asyncio.sleep(min(_TURN, until - loop.time()))


class SocketFile:
    """The file of a unix socket that this process bound."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made = _identity(path)

    def remove(self) -> None:
        """Removes the file unless another server has put its own there."""
        if self._made is not None and _identity(self._path) == self._made:
            self._path.unlink(missing_ok=True)
        self._made = None


def success_line(kind: Kind, address: str) -> str:
    """What goes to stdout once the server listens; scripts wait for it."""
    name = "Serving RESTful" if kind == RESTFUL else kind
    return f"Serving: {name} server start success, listening on {address}"


async def listen_http(
    app: App, config: ListenConfig, *, limits: HttpLimits | None = None, allocate: Allocate | None = None
) -> Listener:
    """Serves an ASGI application over HTTP/1.1, and over TLS where the configuration has it.

    Args:
        limits: other bounds than the default ones with the configuration's size limit.
        allocate: gives the buffers of large bodies, for instance in shared memory.

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
    return await _listen(RESTFUL, address, tls, shared, lambda: HttpConnection(app, shared, loop, bounds))


async def listen_grpc(app: App, config: ListenConfig, *, first_byte_timeout: float = 100.0) -> Listener:
    """Serves an ASGI application that speaks gRPC over HTTP/2: prior knowledge, or ALPN `h2` over TLS.

    Raises:
        ConfigError: the address is wrong.
        StartError: the address cannot be bound, or a TLS file is wrong.
    """
    address = parse_address(config.address, GRPC, any_port=True)
    try:
        tls = server_context(config.tls, "h2") if config.tls else None
    except RuntimeError as error:
        raise _cannot_start(GRPC, address, error) from None
    shared = OpenConnections()
    loop = asyncio.get_running_loop()
    uvicorn_config = http2_config(app)
    return await _listen(
        GRPC, address, tls, shared, lambda: Http2Connection(uvicorn_config, shared, loop, first_byte_timeout)
    )


async def _listen(
    kind: Kind,
    address: Address,
    tls: ssl.SSLContext | None,
    shared: OpenConnections,
    protocol: Callable[[], asyncio.BaseProtocol],
) -> Listener:
    loop = asyncio.get_running_loop()
    timeout = _TLS_HANDSHAKE_TIMEOUT if tls else None
    file = None
    try:
        if address.path is not None:
            sockets = [_bind_unix(address.path)]
            file = SocketFile(Path(address.path))
        else:
            sockets = await _bind_tcp(address)
            address = Address(address.host, sockets[0].getsockname()[1])
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that no resolver takes
        raise _cannot_start(kind, address, error) from None
    servers = []
    for bound in sockets:
        if address.path is not None:
            server = await loop.create_unix_server(
                protocol, sock=bound, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=timeout
            )
        else:
            server = await loop.create_server(
                protocol, sock=bound, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=timeout
            )
        servers.append(server)
    return Listener(address, servers, shared, file)


async def _bind_tcp(address: Address) -> list[socket.socket]:
    """A bound socket for every address the host has; one that the machine cannot use is left out if others can.

    Raises:
        OSError: none could be bound, or a port is taken.
    """
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    failure = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    port = address.port
    for family, _, _, _, name in dict.fromkeys(found):
        try:
            bound = _tcp_socket(family, (name[0], port, *name[2:]))
        except OSError as error:
            failure = error
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            break
        sockets.append(bound)
        port = bound.getsockname()[1]
    else:
        if sockets:
            return sockets
    for bound in sockets:
        bound.close()
    raise failure


def _tcp_socket(family: int, name: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not REUSEPORT: a busy port must fail
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit it
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(name)
    except OSError:
        bound.close()
        raise
    return bound


def _bind_unix(path: str) -> socket.socket:
    """Raises OSError where the path is taken by a live server or by another file, or cannot be made."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        if _is_stale(path):
            os.unlink(path)
        bound.bind(path)
    except OSError:
        bound.close()
        raise
    return bound


def _is_stale(path: str) -> bool:
    """Whether the path is a socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _cannot_start(kind: Kind, address: Address, error: Exception) -> StartError:
    failed = (
        f"create server failed, address {address}" if kind == GRPC else f"bind to the socket address {address} failed"
    )
    return StartError(f"Serving Error: {kind} server start failed, {failed}: {error}")
