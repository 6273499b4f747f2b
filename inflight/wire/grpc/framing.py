"""gRPC's length-prefixed messages: one byte of flags, four of length (big endian), the message."""

from __future__ import annotations

import asyncio
import struct
import zlib
from typing import NamedTuple

from inflight.wire.grpc.status import INTERNAL, RESOURCE_EXHAUSTED, UNIMPLEMENTED, GrpcError

PREFIX = 5
_PREFIX = struct.Struct(">BI")
_COMPRESSED = 1
_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_ACCEPT = (b"grpc-accept-encoding", b"identity,deflate,gzip")
_SMALL = 4 * 1024
"""Compressed messages up to this size are opened on the event loop: at deflate's best they are 4 MiB."""


class Framed(NamedTuple):
    """One message as it came."""

    compressed: bool
    data: bytes


def prefix(message: bytes) -> bytes:
    """The five bytes before an uncompressed message."""
    return _PREFIX.pack(0, len(message))


def check_reply(size: int, limit: int) -> None:
    """Whether a reply of so many bytes may be sent.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit.
    """
    if size > limit:
        raise GrpcError(RESOURCE_EXHAUSTED, f"SERVER: Sent message larger than max ({size} vs. {limit})")


def check_encoding(encoding: bytes) -> None:
    """Whether messages in this `grpc-encoding` can be read.

    Raises:
        GrpcError: UNIMPLEMENTED, with the encodings that can.
    """
    if encoding not in _WBITS and encoding != b"identity":
        text = f"grpc-encoding {encoding!r} is not supported, use identity, deflate or gzip"
        raise GrpcError(UNIMPLEMENTED, text, (_ACCEPT,))


class MessageReader:
    """Cuts a stream of bytes into messages. Holds at most one message's bytes and one chunk more.

    Args:
        limit: bytes of one message.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, the message that begins is over the limit; INTERNAL, unknown flags.
        """
        self._buffer += chunk
        self._length()

    def take(self) -> Framed | None:
        """The next whole message, or None.

        Raises:
            GrpcError: as `feed`, for the message after it.
        """
        length = self._length()
        if length is None or len(self._buffer) < PREFIX + length:
            return None
        with memoryview(self._buffer) as view:
            framed = Framed(bool(view[0]), bytes(view[PREFIX : PREFIX + length]))
        del self._buffer[: PREFIX + length]
        return framed

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            GrpcError: INTERNAL, in the middle of a message.
        """
        if self._buffer:
            raise GrpcError(
                INTERNAL, f"the request ended in the middle of a message, {len(self._buffer)} bytes of it came"
            )

    def _length(self) -> int | None:
        """Length of the message that begins the buffer, or None where its prefix is not whole."""
        if len(self._buffer) < PREFIX:
            return None
        return _checked(self._buffer, self._limit)


def _checked(data: bytes | bytearray, limit: int) -> int:
    """The length in a prefix."""
    flags, length = _PREFIX.unpack_from(data)
    if flags > _COMPRESSED:
        raise GrpcError(INTERNAL, f"a message begins with the unknown flags {flags}, they must be 0 or 1")
    if length > limit:
        raise GrpcError(RESOURCE_EXHAUSTED, f"SERVER: Received message larger than max ({length} vs. {limit})")
    assert isinstance(length, int)
    return length


def single(body: bytes, limit: int) -> Framed:
    """The one message of a whole request body.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit; INTERNAL, the body is not exactly one message.
    """
    if len(body) < PREFIX or len(body) != PREFIX + _checked(body, limit):
        raise GrpcError(INTERNAL, f"the request must be exactly one length-prefixed message, {len(body)} bytes came")
    return Framed(bool(body[0]), body[PREFIX:])


async def opened(framed: Framed, encoding: bytes, limit: int) -> bytes:
    """The message's own bytes; larger compressed ones are opened off the event loop.

    Raises:
        GrpcError: INTERNAL, it is not what `encoding` says; RESOURCE_EXHAUSTED, it grows over the limit.
    """
    if not framed.compressed:
        return framed.data
    wbits = _WBITS.get(encoding)
    if wbits is None:
        raise GrpcError(INTERNAL, "a message is flagged as compressed, but grpc-encoding names no compression")
    if len(framed.data) <= _SMALL:
        return _decompress(framed.data, wbits, limit)
    return await asyncio.to_thread(_decompress, framed.data, wbits, limit)


def _decompress(data: bytes, wbits: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj(wbits)
    try:
        message = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise GrpcError(INTERNAL, f"a compressed message cannot be opened: {error}") from None
    if len(message) > limit:
        text = f"SERVER: Received message larger than max after decompression (more than {limit} vs. {limit})"
        raise GrpcError(RESOURCE_EXHAUSTED, text)
    if not decompressor.eof:
        raise GrpcError(INTERNAL, "a compressed message cannot be opened: it is not complete")
    return message
