"""An HTTP/2 client that does what grpcio would not: odd headers, half messages, silence."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

import pytest
from google.protobuf.message import Message


class RawClient:
    """One connection. Answers are read on demand.

    Attributes:
        heads: response headers by stream.
    """

    def __init__(self, address: str, seconds: float = 5.0) -> None:
        self._zttp = zttp = pytest.importorskip("zttp")
        self.socket = _connected(address)
        self.heads: dict[int, list[tuple[bytes, bytes]]] = {}
        self._statuses: dict[int, int] = {}
        self._ends: dict[int, dict[bytes, bytes]] = {}
        self._seconds = seconds
        self._connection: Any = zttp.Connection(zttp.CLIENT, protocol=zttp.HTTP2)
        self._connection.initiate_connection()
        try:
            self._flush()
        except OSError:
            self.close()
            raise

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def post(
        self,
        path: str | bytes,
        message: Message | None = None,
        *,
        method: bytes = b"POST",
        content_type: bytes = b"application/grpc",
        te: bool = True,
        timeout: bytes | None = None,
        encoding: bytes | None = None,
    ) -> int:
        """Begins a call, and ends its request where a message is given."""
        path = path.encode() if isinstance(path, str) else path
        headers = [(b"host", b"test"), (b"content-type", content_type)]
        headers += [(b"te", b"trailers")] if te else []
        headers += [(b"grpc-timeout", timeout)] if timeout is not None else []
        headers += [(b"grpc-encoding", encoding)] if encoding is not None else []
        stream = self._connection.send_request(method, path, b"2", headers)
        if message is not None:
            data = message.SerializeToString()
            stream.send_data(struct.pack(">BI", 0, len(data)) + data)
            stream.end_message()
        self._flush()
        number: int = stream.stream_id
        return number

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """More of a request's body."""
        self._connection.stream(stream).send_data(data)
        if end:
            self._connection.stream(stream).end_message()
        self._flush()

    def windows(self, stream: int) -> tuple[int, int]:
        """Bytes that may be sent now: on a stream, on the connection."""
        return self._connection.stream(stream).send_window, self._connection.send_window

    def status(self, stream: int) -> int:
        """The HTTP status of an answer."""
        self._read_until(lambda: stream in self._statuses)
        return self._statuses[stream]

    def trailers(self, stream: int) -> dict[bytes, bytes]:
        """What ended an answer, also where it is nothing but a head; `{}` for a reset."""
        self._read_until(lambda: stream in self._ends)
        return self._ends[stream]

    def _flush(self) -> None:
        self.socket.sendall(self._connection.data_to_send())

    def _read_until(self, done: Any) -> None:
        end = time.monotonic() + self._seconds
        while not done():
            self.socket.settimeout(max(end - time.monotonic(), 0.001))
            data = self.socket.recv(65536)
            assert data, "the server closed the connection"
            self._connection.receive_data(data)
            while (event := self._connection.next_event()) is not self._zttp.NEED_DATA:
                if isinstance(event, self._zttp.Response):
                    self._statuses[event.stream_id] = event.status_code
                    self.heads[event.stream_id] = list(event.headers)
                elif isinstance(event, self._zttp.EndOfMessage):
                    head = dict(self.heads[event.stream_id])
                    self._ends[event.stream_id] = dict(event.trailers) or (head if b"grpc-status" in head else {})
                elif isinstance(event, self._zttp.RstStream):
                    self._ends.setdefault(event.stream_id, {})
            self._flush()


def _connected(address: str) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        made = socket.create_connection((host, int(port)))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(address[len("unix:") :])
    except OSError:
        made.close()
        raise
    return made
