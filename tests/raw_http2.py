"""An HTTP/2 client that does what grpcio would not: odd headers, half messages, silence."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message


class RawClient:
    """One connection. Answers are read on demand.

    Attributes:
        heads: response headers by stream.
    """

    def __init__(self, address: str, seconds: float = 5.0) -> None:
        pytest.importorskip("h2")
        from h2.config import H2Configuration
        from h2.connection import H2Connection

        self.socket = _connected(address)
        self.heads: dict[int, list[tuple[bytes, bytes]]] = {}
        self._ends: dict[int, dict[bytes, bytes]] = {}
        self._trailers: dict[int, dict[bytes, bytes]] = {}
        self._seconds = seconds
        self._connection: Any = H2Connection(
            H2Configuration(
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
            )
        )
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
        headers = [(b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"test")]
        headers += [(b"content-type", content_type)]
        headers += [(b"te", b"trailers")] if te else []
        headers += [(b"grpc-timeout", timeout)] if timeout is not None else []
        headers += [(b"grpc-encoding", encoding)] if encoding is not None else []
        stream: int = self._connection.get_next_available_stream_id()
        self._connection.send_headers(stream, headers)
        if message is not None:
            data = message.SerializeToString()
            self.send(stream, struct.pack(">BI", 0, len(data)) + data, end=True)
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """More of a request's body, which its windows have to have room for."""
        size = self._connection.max_outbound_frame_size
        for first in range(0, len(data), size):
            self._connection.send_data(stream, data[first : first + size])
        if end:
            self._connection.end_stream(stream)
        self._flush()

    def windows(self, stream: int) -> tuple[int, int]:
        """Bytes that may be sent now: on a stream, on the connection."""
        return self._connection.streams[stream].outbound_flow_control_window, (
            self._connection.outbound_flow_control_window
        )

    def status(self, stream: int) -> int:
        """The HTTP status of an answer."""
        self._read_until(lambda: stream in self.heads)
        return int(dict(self.heads[stream])[b":status"])

    def trailers(self, stream: int) -> dict[bytes, bytes]:
        """What ended an answer, also where it is nothing but a head; `{}` for a reset."""
        self._read_until(lambda: stream in self._ends)
        return self._ends[stream]

    def _flush(self) -> None:
        self.socket.sendall(self._connection.data_to_send())

    def _read_until(self, done: Callable[[], bool]) -> None:
        from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

        end = time.monotonic() + self._seconds
        while not done():
            self.socket.settimeout(max(end - time.monotonic(), 0.001))
            data = self.socket.recv(65536)
            assert data, "the server closed the connection"
            for event in self._connection.receive_data(data):
                if isinstance(event, ResponseReceived):
                    self.heads[event.stream_id] = list(event.headers)
                elif isinstance(event, TrailersReceived):
                    self._trailers[event.stream_id] = dict(event.headers)
                elif isinstance(event, DataReceived) and event.flow_controlled_length:
                    self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, StreamEnded):
                    head = dict(self.heads[event.stream_id])
                    alone = head if b"grpc-status" in head else {}
                    self._ends.setdefault(event.stream_id, self._trailers.get(event.stream_id, alone))
                elif isinstance(event, StreamReset):
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
