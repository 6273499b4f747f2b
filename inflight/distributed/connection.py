"""A TCP connection that carries messages: read by one thread, written by any."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

from inflight.contract import Array
from inflight.distributed.messages import (
    MAX_BLOB,
    MAX_HEADER,
    PREFIX,
    AnyMessage,
    ProtocolError,
    decode,
    encode,
)
from inflight.errors import ConfigError, StartError
from inflight.link import Guard, Joined, SecureSocket

SEND_SECONDS = 10.0
"""Seconds in which the other side must take something of what is sent to it."""

HANDSHAKE_SECONDS = 5.0
"""Seconds in which two ends show each other a token at least."""

SAME_TOKEN = "the servable and its agents need the same token (INFLIGHT_AGENTS_TOKEN), or none both"

_FIRST_BYTES = 64 << 10
"""The longest header of somebody who is not known yet."""


class Connection:
    """One end of a connection.

    Args:
        sock: connected, maybe encrypted; it is closed by `close` only.

    Attributes:
        peer: the other side's address.
        heard: when something was received last, by `time.monotonic`.
        known: the other side has shown that it belongs here, so it may send tensors.
        closed: `close` was called.
    """

    def __init__(self, sock: Joined) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self.known = False
        self.closed = False
        self.heard = time.monotonic()
        if not isinstance(sock, SecureSocket):
            sock.setblocking(True)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SEND_SECONDS), 0))
            with contextlib.suppress(OSError):  # no TCP: a test's socket pair
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.peer = ":".join(str(part) for part in sock.getpeername()[:2])
        except OSError:
            self.peer = "?"

    def admit(self, guard: Guard, seconds: float) -> None:
        """Lets in who shows the token, before anything else is read. Args: seconds: in which it must be shown.

        Raises:
            StartError: it is not shown; the connection has ended.
        """
        assert not isinstance(self._sock, SecureSocket)
        self._sock = guard.admit(self._sock, seconds)
        if self.closed:  # by another thread, which could not wake the handshake
            self._sock.close()
            raise StartError("the worker ends")

    def send(self, message: AnyMessage, arrays: Sequence[Array] = ()) -> bool:
        """Sends a message; False when the other side is gone or takes nothing."""
        parts = encode(message, arrays)
        try:
            with self._lock:
                for part in parts:
                    self._sock.sendall(part)
        except (OSError, ValueError):  # it did not read for `SEND_SECONDS`, or was closed by another thread
            self.close()
            return False
        return True

    def receive(self, seconds: float | None = None) -> tuple[AnyMessage, bytearray] | None:
        """The next message with its blob, or None when the other side is gone.

        Args:
            seconds: how long to wait in all; None: as long as it takes.

        Raises:
            TimeoutError: nothing whole came in time.
            ProtocolError: it is no message.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        prefix = self._exactly(PREFIX.size, deadline)
        if prefix is None:
            return None
        header_size, blob_size = PREFIX.unpack(prefix)
        if header_size > (MAX_HEADER if self.known else _FIRST_BYTES) or blob_size > (MAX_BLOB if self.known else 0):
            raise ProtocolError(f"{self.peer} does not speak this protocol")
        header = self._exactly(header_size, deadline)
        blob = self._exactly(blob_size, deadline) if header is not None else None
        if header is None or blob is None:
            return None
        self.heard = time.monotonic()
        return decode(header), blob

    def _exactly(self, size: int, deadline: float | None) -> bytearray | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self._receive_into(view, deadline)
            except TimeoutError:
                if deadline is None or time.monotonic() < deadline:
                    return None  # the system's: the other machine is gone
                raise
            except (OSError, ValueError):  # ValueError: closed by another thread
                return None
            if not count:
                return None
            view = view[count:]
            self.heard = time.monotonic()
        return buffer

    def _receive_into(self, view: memoryview, deadline: float | None) -> int:
        """The number of bytes that came, 0 at the end. Raises TimeoutError: none came in time."""
        late = TimeoutError(f"{self.peer} did not answer in time")
        if isinstance(self._sock, SecureSocket):
            try:
                return self._sock.recv_into(view, deadline)
            except TimeoutError:
                raise late from None
        if deadline is not None:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise late
        return self._sock.recv_into(view)

    def close(self) -> None:
        """Closes it, from any thread; `receive` then returns None."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Gives the descriptor back; called by the thread that receives."""
        self.close()
        self._sock.close()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        ConfigError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"The format of the distributed address '{address}' is illegal: write ip:port with a port from 1 to 65535, "
            "as 127.0.0.1:6200"
        )
    return host.strip("[]"), int(port)


def guard_of(token: str | None, tls: bool) -> Guard | None:
    """What asks for this token; None where there is none."""
    return None if token is None else Guard(token, tls, SEND_SECONDS)


def connect(address: str, seconds: float, guard: Guard | None = None) -> Connection:
    """A connection to a worker, or to whoever is there.

    Raises:
        OSError: nobody answers in time.
        ConfigError: the address is none.
        StartError: with a guard: nobody answers in time, or who answers does not know its token.
    """
    where = split_address(address)
    if guard is None:
        return Connection(socket.create_connection(where, timeout=seconds))
    try:
        return Connection(guard.join(address, max(seconds, HANDSHAKE_SECONDS)))
    except StartError as error:
        raise StartError(f"{error}; {SAME_TOKEN}") from None
