"""gRPC messages: decompression and size limits."""

from __future__ import annotations

import asyncio
import zlib
from typing import NamedTuple

from inflight.wire.grpc.status import INTERNAL, RESOURCE_EXHAUSTED, UNIMPLEMENTED, GrpcError

_WBITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_ACCEPT = (b"grpc-accept-encoding", b"identity,deflate,gzip")
_SMALL = 4 * 1024
"""Compressed messages up to this size are decompressed on the event loop, to 4 MiB at most with deflate."""


class Framed(NamedTuple):
    """One message as it came."""

    compressed: bool
    data: bytes | memoryview


def check_reply(size: int, limit: int) -> None:
    """Checks the size of a reply in bytes.

    Raises:
        GrpcError: RESOURCE_EXHAUSTED, it is over the limit.
    """
    if size > limit:
        raise GrpcError(RESOURCE_EXHAUSTED, f"SERVER: Sent message larger than max ({size} vs. {limit})")


def check_encoding(encoding: bytes) -> None:
    """Checks that messages in this `grpc-encoding` can be read.

    Raises:
        GrpcError: UNIMPLEMENTED, with the supported encodings.
    """
    if encoding not in _WBITS and encoding != b"identity":
        text = f"grpc-encoding {encoding!r} is not supported, use identity, deflate or gzip"
        raise GrpcError(UNIMPLEMENTED, text, (_ACCEPT,))


async def opened(framed: Framed, encoding: bytes, limit: int) -> bytes | memoryview:
    """The message's bytes, decompressed; larger compressed messages are decompressed off the event loop.

    Raises:
        GrpcError: INTERNAL, it is not in this encoding; RESOURCE_EXHAUSTED, it decompresses to more than the limit.
    """
    if not framed.compressed:
        return framed.data
    wbits = _WBITS.get(encoding)
    if wbits is None:
        raise GrpcError(INTERNAL, "a message is flagged as compressed, but grpc-encoding names no compression")
    if len(framed.data) <= _SMALL:
        return _decompress(framed.data, wbits, limit)
    return await asyncio.to_thread(_decompress, framed.data, wbits, limit)


def _decompress(data: bytes | memoryview, wbits: int, limit: int) -> bytes:
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
