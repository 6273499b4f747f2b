"""Binds listening sockets to a host's addresses or to a unix socket's file, and words the errors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

from inflight.errors import StartError
from inflight.wire.address import GRPC, Address, Kind


class SocketFile:
    """The file of a unix socket that this process bound."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bound = _identity(path)

    def remove(self) -> None:
        """Removes the file unless another server has put its own there."""
        if self._bound is not None and _identity(self._path) == self._bound:
            self._path.unlink(missing_ok=True)
        self._bound = None


async def bind_tcp(address: Address) -> list[socket.socket]:
    """A bound socket for every address of the host. Addresses that the machine cannot use are skipped if others work.

    Raises:
        OSError: none could be bound, or a port is taken.
    """
    addresses = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    failure = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    port = address.port
    for family, _, _, _, name in dict.fromkeys(addresses):
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


def bind_unix(path: str) -> socket.socket:
    """A socket bound to a file, whose folder is created if it is missing.

    Raises:
        OSError: the path is taken by a live server or by another file, or cannot be created.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
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
    """Whether the path is a socket without a listener, left behind by a process that ended."""
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
    """Device and inode of the file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def cannot_start(kind: Kind, address: Address, error: Exception) -> StartError:
    where = address.written or address
    failed = f"create server failed, address {where}" if kind == GRPC else f"bind to the socket address {where} failed"
    return StartError(f"Serving Error: {kind} server start failed, {failed}: {error}")
