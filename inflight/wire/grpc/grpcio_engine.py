"""The gRPC door on grpcio's C core, for builds without nghttp2.

The core does HTTP/2, TLS, compression, deadlines and the limit of received messages; procedures and statuses are those
of the other engine. Some behaviour of the core (grpcio 1.85) does not suit a server:

- it binds a port that another process listens on, and reports success where only one of a host name's addresses could
  be bound. Here the addresses are bound once before the core binds them;
- it unlinks the file of a unix socket before it binds and when it stops, even if another process made the file. Here
  the core's socket has a name of its own, and is then renamed to the one that was asked for;
- it closes channels that send keep-alive pings more often than every five minutes. Here any rate is allowed.

Two things are left as they are: 0.0.0.0 and [::] both mean all addresses of both families, and a POST of any content
type is read as a call.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc._cython import cygrpc

from inflight.config import TlsConfig
from inflight.wire.address import GRPC, UNIX, Address
from inflight.wire.grpc.app import GrpcApp
from inflight.wire.grpc.completions import Completions
from inflight.wire.grpc.grpcio_calls import Calls
from inflight.wire.sockets import SocketFile, bind_tcp, bind_unix, cannot_start

MAX_STREAMS = 1024
"""Calls that one connection may have open."""
MAX_PENDING = 8192
"""Calls that may wait in the core for this process; beyond it the core cuts random ones, of any caller."""
_DISCONNECT = 1.0
"""Seconds that a handler has to end by itself once its call is cut."""


class GrpcioListener:
    """A `Listener` over the core's server. Make it with `listen_grpcio`."""

    def __init__(self, app: GrpcApp, address: Address, tls: TlsConfig | None, options: list[tuple[str, int]]) -> None:
        self.address = str(address)
        self._where = address
        self._calls = Calls(app)
        self._tls = tls
        self._options = options
        self._completions: Completions | None = None
        self._server: Any = None
        self._file: SocketFile | None = None

    async def open(self) -> None:
        """Begins to accept.

        Raises:
            OSError, UnicodeError, RuntimeError: the address cannot be bound.
        """
        names = await _check_free(self._where)
        completions = Completions(self._calls.ask, lambda: self._calls.held > 0)
        server = cygrpc.Server(self._options, False)
        server.register_completion_queue(completions.queue)
        add_port = _port_opener(server, self._tls)
        try:
            if self._where.path is not None:
                self._file = _open_unix(self._where.path, add_port)
            else:
                self._where = _open_tcp(self._where, names, add_port)
        except BaseException:
            server.destroy()
            await completions.close()
            raise
        self.address = str(self._where)
        server.start()
        self._completions, self._server = completions, server
        self._calls.serve(server, completions)

    async def close(self, grace: float) -> None:
        """As `Listener` says."""
        if self._file is not None:
            self._file.remove()
        server, self._server = self._server, None
        if server is None:
            return
        assert self._completions is not None
        self._calls.stop()
        stopped = asyncio.get_running_loop().create_future()
        server.shutdown(self._completions.queue, lambda _event: stopped.set_result(None))
        await asyncio.wait({stopped}, timeout=grace)
        if not stopped.done():
            server.cancel_all_calls()
            tasks = [call.task for call in self._calls.running if call.task is not None]
            await asyncio.wait({stopped, *tasks}, timeout=_DISCONNECT)
        tasks = [call.task for call in self._calls.running if call.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        server.destroy()
        await self._completions.close()
        self._completions = None
        self._calls.forget()

    def forget(self) -> None:
        """As `Listener` says."""
        if self._file is not None:
            self._file.remove()


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
    raise failure  # outside of `except`, whose error holds grpcio's server, which must not outlive the loop


def _options(max_message_bytes: int, first_byte_timeout: float) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),  # `check_reply` checks it, with our own text
        ("grpc.server_handshake_timeout_ms", round(first_byte_timeout * 1000)),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
        ("grpc.http2.max_ping_strikes", 0),  # clients may ping at any rate
        ("grpc.keepalive_permit_without_calls", 1),  # the server's own pings every two hours detect lost peers
    ]


def _port_opener(server: Any, tls: TlsConfig | None) -> Callable[[str], int]:
    """Returns a function that binds an address and returns its port, or raises RuntimeError."""
    credentials = None
    if tls is not None:
        pair = (Path(tls.private_key).read_bytes(), Path(tls.certificate).read_bytes())
        ca = Path(tls.custom_ca).read_bytes() if tls.verify_client and tls.custom_ca is not None else None
        credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)._credentials

    def add_port(address: str) -> int:
        port: int = server.add_http2_port(address.encode(), credentials)
        if not port:
            raise RuntimeError(f"grpc's core cannot listen on {address}")
        return port

    return add_port


async def _check_free(address: Address) -> list[str]:
    """Binds an address and releases it: unlike grpcio's error, this one says why it cannot be bound.

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
