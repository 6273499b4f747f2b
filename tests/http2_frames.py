"""HTTP/2 frames by hand, for clients that no library would be."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def frames(data: bytes) -> Iterator[Frame]:
    """What whole frames say."""
    while data:
        length = int.from_bytes(data[:3], "big")
        yield Frame(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length])
        assert len(data) >= 9 + length
        data = data[9 + length :]


def text(value: bytes) -> bytes:
    """A string of HPACK without Huffman's code, up to 16,510 bytes."""
    if len(value) < 127:
        return bytes((len(value),)) + value
    rest = len(value) - 127
    return bytes((127, 0x80 | rest & 0x7F, rest >> 7)) + value


def head(path: str, **further: str) -> bytes:
    """A call's header block: POST, http, path, authority, content type, te. It makes no entry in the table."""
    block = b"\x83\x86\x04" + text(path.encode()) + b"\x01" + text(b"test")
    block += b"\x0f\x10" + text(b"application/grpc")
    block += b"\x00" + text(b"te") + text(b"trailers")
    for name, value in further.items():
        block += b"\x00" + text(name.replace("_", "-").encode()) + text(value.encode())
    return block


def message(data: bytes, flags: int = 0) -> bytes:
    """A gRPC message with its prefix."""
    return struct.pack(">BI", flags, len(data)) + data
