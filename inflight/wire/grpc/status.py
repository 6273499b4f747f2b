"""gRPC statuses: the codes that this server sends, and their encoding in headers."""

from __future__ import annotations

import logging
from urllib.parse import quote, unquote

from inflight.errors import InflightError, RateLimited

OK = 0
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
RESOURCE_EXHAUSTED = 8
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
UNAUTHENTICATED = 16

MAX_MESSAGE = 6 * 1024
"""Bytes of an encoded status text. Clients take 8 KiB of trailers in all and drop the call beyond it."""

# Printable ASCII except the percent sign is not encoded.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

_logger = logging.getLogger("inflight.grpc")


class GrpcError(Exception):
    """A status other than OK.

    Attributes:
        code: number of the status.
        headers: further response headers.
    """

    def __init__(self, code: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers


def status_of(error: Exception, path: str) -> GrpcError:
    """The status that ends a call whose handler raised `error`. An error without a status is logged as unhandled."""
    if isinstance(error, GrpcError):
        return error
    if isinstance(error, InflightError):
        retry = ((b"retry-after", b"%d" % error.retry_after),) if isinstance(error, RateLimited) else ()
        return GrpcError(error.grpc_code, error.message, retry)
    _logger.error("unhandled error, %s", path, exc_info=error)
    return GrpcError(INTERNAL, "internal server error, the server's log has the details")


def unknown_method(path: str) -> GrpcError:
    """The status of a call that no service offers."""
    return GrpcError(UNIMPLEMENTED, f"Method not found! No service here offers '{path}'")


def short_message(text: str) -> str:
    """The text as valid Unicode, cut so that it has at most `MAX_MESSAGE` bytes once encoded."""
    return unquote(encode_message(text).decode())


def encode_message(text: str) -> bytes:
    """The value of `grpc-message`: UTF-8, percent-encoded, cut at `MAX_MESSAGE` between two characters."""
    encoded = quote(text, safe=_PLAIN, errors="replace")
    if len(encoded) > MAX_MESSAGE:
        keep = len(text)
        while len(encoded) > MAX_MESSAGE:
            keep = min(keep - 1, keep * MAX_MESSAGE // len(encoded))
            encoded = quote(text[:keep], safe=_PLAIN, errors="replace")
    # A header value may not begin or end with a blank.
    return encoded.strip(" ").encode()


def parse_timeout(value: bytes) -> float:
    """Seconds of a `grpc-timeout` header: at most 8 digits and a unit.

    Raises:
        GrpcError: INTERNAL, it is malformed.
    """
    unit = _UNITS.get(value[-1:])
    digits = value[:-1]
    if unit is None or not digits.isdigit() or len(digits) > 8:
        raise GrpcError(INTERNAL, f"malformed grpc-timeout {value!r}, it is 1 to 8 digits and one of H M S m u n")
    return int(digits) * unit


_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
