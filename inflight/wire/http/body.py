"""Reads request bodies up to a limit and decompresses them.

The connection watches deadlines (`wire.http.connection`); here a body is either complete or a typed error.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import TypeAlias

from inflight.errors import InvalidRequest, TooLarge
from inflight.wire.http.asgi import Receive, Scope, header
from inflight.wire.http.disconnect import Disconnected

Body: TypeAlias = "bytes | bytearray | memoryview"
"""A request body. A memoryview has the format of bytes, is writable, and belongs to its reader only."""

_ON_LOOP = 64 * 1024
"""Compressed bytes up to which bodies are unpacked, and plain bytes up to which they are packed, on the event loop."""
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_RAW_DEFLATE = -15
_LEVEL = 1  # the fastest: on a local network bytes are cheaper than time


MESSAGE_OPTION = "--max-message-mb (max_msg_mb_size in a script)"
"""The option that sets the size of a listener's messages."""


async def read_body(scope: Scope, receive: Receive, limit: int, option: str = MESSAGE_OPTION) -> Body:
    """The whole body, as received. A body in one piece is not copied.

    Args:
        limit: bytes.
        option: the server's option that sets the limit, for the text of an error.

    Raises:
        TooLarge: it is announced as larger than `limit`, or turns out to be; the rest is not awaited.
        Disconnected: the client left before the end of the body.
    """
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced[:19]) > limit:
        raise too_large(limit, option)
    message = await receive()
    whole: Body = message.get("body", b"")
    parts: bytearray | None = None
    while True:
        if message["type"] == "http.disconnect":
            raise Disconnected("the client closed its connection before its request was complete")
        if len(whole) > limit:
            raise too_large(limit, option)
        if not message.get("more_body"):
            return whole
        if parts is None:
            parts = bytearray(whole)
            whole = parts
        message = await receive()
        parts += message.get("body", b"")


def too_large(limit: int, option: str = MESSAGE_OPTION) -> TooLarge:
    """The error of a body over `limit` bytes, in MindSpore Serving's words. Args: option: as for `read_body`."""
    return TooLarge(
        f"http message is bigger than {limit} bytes, the limit of this server: send less in a request, or raise "
        f"{option} of the server"
    )


async def unpack(scope: Scope, body: Body, limit: int) -> Body:
    """The body without its Content-Encoding; a large one is unpacked in a thread.

    Raises:
        InvalidRequest: an encoding other than gzip and deflate, or the body is not in that encoding.
        TooLarge: it unpacks to more than `limit` bytes; unpacking stops there.
    """
    named = header(scope, b"content-encoding")
    encoding = named.decode("latin-1").strip().lower() if named else "identity"
    if encoding in ("identity", ""):
        return body
    if encoding not in _WINDOW_BITS:
        raise InvalidRequest(f"Content-Encoding '{encoding}' is not supported, use gzip, deflate or none")
    if len(body) <= _ON_LOOP:
        return inflate(body, encoding, limit)
    return await asyncio.to_thread(inflate, body, encoding, limit)


def inflate(body: Body, encoding: str, limit: int) -> bytes:
    """Unpacks gzip (of one or more members) or deflate (with or without zlib's header).

    Raises:
        InvalidRequest, TooLarge: as `unpack`.
    """
    bits = _WINDOW_BITS[encoding]
    if bits == _WINDOW_BITS["deflate"] and not _has_zlib_header(body):
        bits = _RAW_DEFLATE
    rest: Body = body
    out: list[bytes] = []
    size = 0
    try:
        while rest:
            member = zlib.decompressobj(bits)
            out.append(member.decompress(rest, limit + 1 - size))
            size += len(out[-1])
            if size > limit:
                raise too_large(limit)
            if not member.eof:
                raise InvalidRequest(f"the {encoding} body ends too early")
            rest = member.unused_data
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {encoding}: {error}") from None
    return b"".join(out)


def accepted_encoding(scope: Scope) -> str | None:
    """`gzip` or `deflate` if the client names only that one, else None.

    Most client libraries offer a list of codings by default, and compressing tensors costs more time than it saves. A
    client that names a single one wants it, as Triton's clients do.
    """
    accepted = header(scope, b"accept-encoding")
    named = accepted.decode("latin-1").strip().lower() if accepted else ""
    return named if named in ("gzip", "deflate") else None


async def pack(parts: Sequence[Body], encoding: str) -> bytes:
    """The parts, joined and compressed as `gzip` or `deflate`; large ones in a thread."""
    if sum(map(len, parts)) <= _ON_LOOP:
        return _deflate(parts, encoding)
    return await asyncio.to_thread(_deflate, parts, encoding)


def _deflate(parts: Sequence[Body], encoding: str) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])


def _has_zlib_header(body: Body) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
