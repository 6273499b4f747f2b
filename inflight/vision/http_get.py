"""One GET request to one address, with nothing that a file of an image does not need: no pool, no cookies, no proxies,
no compression, no authentication.

The libraries at hand resolve names themselves, follow redirects themselves, or need a layer underneath replaced to do
neither (httpcore's network back end, aiohttp's connector); the answer is parsed by httptools, as requests are.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httptools

from inflight.errors import InvalidRequest
from inflight.vision.limits import check_bytes

HEAD = 64 * 1024
"""Bytes of an answer's headers at most."""
CONNECTING = 4.0
"""Seconds until the next of several addresses is tried."""
CHUNK = 256 * 1024
REDIRECTS = (301, 302, 303, 307, 308)

Connect = Callable[
    [str, int, "ssl.SSLContext | None", "str | None"],
    Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]],
]
"""Connects to (address, port), with TLS for a server's name if a context is given."""


async def connect(
    address: str, port: int, tls: ssl.SSLContext | None, name: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(address, port, ssl=tls, server_hostname=name, limit=CHUNK)


@dataclass(frozen=True)
class Place:
    """Where a GET goes.

    Attributes:
        host: in ASCII, lower case, without brackets and final dot.
        target: path and query.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


@dataclass
class Answer:
    """Attributes:
    location: of a redirect.
    body: of status 200; otherwise it is not read.
    """

    status: int
    location: str | None
    body: bytes


async def get(
    place: Place, address: str, most: int, tls: ssl.SSLContext | None = None, connect: Connect = connect
) -> Answer:
    """Asks the server at `address`, whatever the place's name resolves to.

    Args:
        most: bytes of the body.

    Raises:
        InvalidRequest: the answer is too large, compressed, cut off, or not HTTP.
        OSError: no connection, or it broke.
    """
    secure = place.scheme == "https"
    reader, writer = await _connected(
        connect(address, place.port, tls if secure else None, place.host if secure else None)
    )
    try:
        writer.write(
            f"GET {place.target} HTTP/1.1\r\nHost: {place.origin}\r\nUser-Agent: inflight\r\nAccept: image/*\r\n"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        response = _Response(most)
        while not response.enough:
            data = await reader.read(CHUNK)
            if not data:
                response.end()
                break
            response.feed(data)
        return Answer(response.status, response.location, bytes(response.body))
    finally:
        writer.transport.abort()


async def _connected(
    connecting: Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Waits for a connection, `CONNECTING` seconds. Who is cancelled leaves none behind, also not one that is there at
    the same moment; `wait_for` would hand that out and forget the cancellation before Python 3.12."""
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.wait([task], timeout=CONNECTING)
    except asyncio.CancelledError:
        task.add_done_callback(_dropped)
        task.cancel()
        raise
    if not task.done():
        task.add_done_callback(_dropped)
        task.cancel()
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return task.result()


def _dropped(task: asyncio.Task[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result()[1].transport.abort()


class _Response:
    """Takes an answer in as it comes, and complains as soon as something is wrong."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parser = httptools.HttpResponseParser(self)
        self._head = 0
        self._length: int | None = None
        self._chunked = False
        self._encoding = ""
        self._headed = False
        self._fault: InvalidRequest | None = None
        self.status = 0
        self.location: str | None = None
        self.body = bytearray()
        self.enough = False

    def feed(self, data: bytes) -> None:
        """
        Raises:
            InvalidRequest: as `get`.
        """
        if not self._headed:
            self._head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._fault is None and not self.enough:  # what follows the answer does not matter
                raise InvalidRequest("Could not fetch image: its server does not answer in HTTP") from None
        if self._fault is not None:
            raise self._fault
        if not self._headed and self._head > HEAD:
            raise InvalidRequest(f"Could not fetch image: the answer has more than {HEAD} bytes of headers")

    def end(self) -> None:
        """The connection ended.

        Raises:
            InvalidRequest: before the answer did.
        """
        if not self._headed:
            raise InvalidRequest("Could not fetch image: its server ended the connection without an answer")
        if self._chunked or self._length is not None:
            whole = "" if self._length is None else f" of {self._length}"
            raise InvalidRequest(f"Failed to read image data: the connection ended after {len(self.body)}{whole} bytes")
        self.enough = True

    # Called by httptools, which reports an exception of theirs as an error of its own.

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key == b"location":
            self.location = value.decode(errors="replace")
        elif key == b"content-encoding":
            self._encoding = value.decode("latin-1").strip().lower()
        elif key == b"content-length":
            self._length = int(value) if value.isdigit() and len(value) < 20 else None
        elif key == b"transfer-encoding":
            self._chunked = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # the answer itself is still to come
            self.location, self._encoding, self._length, self._chunked = None, "", None, False
            return
        self._headed = True
        if self.status != 200:
            self.enough = True
        elif self._encoding not in ("", "identity"):
            self._fail(f"Could not fetch image: its server answers with content-encoding {self._encoding[:40]}")
        elif self._length is not None:
            self._check(self._length)

    def on_body(self, data: bytes) -> None:
        if self._fault is None and not self.enough:
            self._check(len(self.body) + len(data))
            if self._fault is None:
                self.body += data

    def on_message_complete(self) -> None:
        if self._headed:
            self.enough = True

    def _check(self, size: int) -> None:
        try:
            check_bytes(size, self._most)
        except InvalidRequest as error:
            self._fault = error

    def _fail(self, text: str) -> None:
        self._fault = InvalidRequest(text)
