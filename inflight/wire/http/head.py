"""HTTP/1.1 heads: of requests as ASGI scopes, of responses as bytes."""

from __future__ import annotations

import http
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools

from inflight.wire.http.asgi import Header, Scope

Peer = tuple[str, int]

_ASGI = {"version": "3.0", "spec_version": "2.3"}


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = {499: "Client Closed Request"}.get(status, "")
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


def response_head(status: int, headers: list[Header], length: int, keep_alive: bool) -> bytes:
    """Head of a response whose body has `length` bytes. Args: headers: all other headers."""
    if len(headers) == 1 and status == 200:  # nearly every answer of a model
        start, end = _usual_head(headers[0], keep_alive)
        return b"%b%d%b" % (start, length, end)
    return _head(status, headers, length, keep_alive)


@lru_cache(maxsize=64)
def _usual_head(line: Header, keep_alive: bool) -> tuple[bytes, bytes]:
    """The head of a good answer with one header: what comes before the length and what comes after it."""
    start, end = _head(200, [line], 0, keep_alive).split(b"content-length: 0", 1)
    return start + b"content-length: ", end


def _head(status: int, headers: list[Header], length: int, keep_alive: bool) -> bytes:
    connection = b"" if keep_alive else b"connection: close\r\n"
    lines = b"".join([b"%b: %b\r\n" % line for line in headers])
    return b"%b%bcontent-length: %d\r\n%b\r\n" % (STATUS_LINES[status], lines, length, connection)


def http_scope(
    method: str,
    url: bytes,
    version: str,
    headers: list[Header],
    scheme: str = "http",
    client: Peer | None = None,
    server: Peer | None = None,
) -> Scope:
    """The ASGI scope of a request. Args: url: as in the request line."""
    if url[:1] == b"/":
        raw_path, _, query = url.partition(b"?")
    else:
        parsed: Any = httptools.parse_url(url)
        raw_path, query = parsed.path or b"/", parsed.query or b""
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": _ASGI,
        "http_version": version,
        "method": method,
        "scheme": scheme,
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": client,
        "server": server,
    }
