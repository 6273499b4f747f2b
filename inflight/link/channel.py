"""The two ends of the connection between the server and one worker, over an inherited socket pair or TCP (`remote`).

Frames over a stream socket instead of a gRPC stream: measured in `bench/link.py`, see docs/architecture.md.
The server's end lives on its event loop, the worker's end is read by one thread and written by any.
"""

from __future__ import annotations

import asyncio
import math
import select
import socket
import threading
from collections.abc import Callable
from typing import cast

from inflight.link.arena import ArenaReader
from inflight.link.codec import MAX_FRAME, PREFIX, AnyMessage, Packer, Unpacker, decode
from inflight.link.secure import SecureSocket

Handler = Callable[[AnyMessage, Unpacker], None]


class ServerChannel(asyncio.Protocol):
    """The server's end.

    Args:
        on_message: called on the loop for every message.
        on_closed: called once when the worker's end is gone.
        reader: the worker's outbox.
    """

    def __init__(self, on_message: Handler, on_closed: Callable[[], None], reader: ArenaReader | None) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._reader = reader
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._given_up = False

    @classmethod
    async def open(
        cls, sock: socket.socket, on_message: Handler, on_closed: Callable[[], None], reader: ArenaReader | None
    ) -> ServerChannel:
        channel = cls(on_message, on_closed, reader)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: channel, sock)
        except BaseException:  # cancelled, too: nothing else would close the transport, which may come later
            channel._given_up = True
            channel.close()
            channel._transport = None  # uvloop closes it by itself then, and reports no end
            raise
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._given_up:
            transport.close()
            return
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        size = len(buffer)
        while size - start >= PREFIX.size:
            length, header = PREFIX.unpack_from(buffer, start)
            end = start + PREFIX.size + length
            if length > MAX_FRAME:
                self.close()
                return
            if size < end:
                break
            # A copy per frame, so that arrays of one frame do not keep the others alive.
            frame = bytes(memoryview(buffer)[start + PREFIX.size : end])
            start = end
            self._on_message(*decode(frame, header, 0, self._reader))
        if start:
            del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_closed()

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def send(self, message: AnyMessage, packer: Packer | None = None) -> None:
        if self._transport is not None:
            self._transport.write((packer or Packer()).frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class WorkerChannel:
    """The worker's end: blocking, `receive` from one thread, `send` from any."""

    def __init__(self, sock: socket.socket | SecureSocket, reader: ArenaReader | None = None) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._lock = threading.Lock()
        self._reader = reader

    def fileno(self) -> int:
        return self._sock.fileno()

    def ready(self, seconds: float | None = 0) -> bool:
        """Whether `receive` has something to read, waiting up to `seconds` (None: as long as it takes)."""
        if len(self._buffer) >= PREFIX.size or (isinstance(self._sock, SecureSocket) and self._sock.pending()):
            return True
        return bool(self._poll.poll(None if seconds is None else math.ceil(seconds * 1000)))

    def receive(self) -> tuple[AnyMessage, Unpacker] | None:
        """The next message, or None when the server is gone."""
        try:
            while len(self._buffer) < PREFIX.size:
                data = self._sock.recv(1 << 18)
                if not data:
                    return None
                self._buffer += data
            length, header = PREFIX.unpack_from(self._buffer)
            frame = self._frame(length)
        except OSError:
            return None
        return None if frame is None else decode(frame, header, 0, self._reader)

    def stop_reading(self) -> None:
        """Makes `receive` and `ready` return at once, from now on."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass

    def _frame(self, length: int) -> bytearray | None:
        """The bytes after the prefix; a bytearray of its own, because stage functions may edit their inputs."""
        end = PREFIX.size + length
        frame = self._buffer[PREFIX.size : end]
        missing = length - len(frame)
        del self._buffer[:end]
        if missing:
            frame += bytes(missing)
            view = memoryview(frame)[length - missing :]
            while view:
                count = self._sock.recv_into(view)
                if not count:
                    return None
                view = view[count:]
        return frame

    def send(self, message: AnyMessage, packer: Packer | None = None) -> bool:
        """False when the server is gone."""
        frame = (packer or Packer()).frame(message)
        try:
            with self._lock:
                self._sock.sendall(frame)
        except OSError:
            return False
        return True

    def close(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()
