"""The native module of the gRPC door: HTTP/2 connections by nghttp2 (`csrc/session.h`)."""

from collections.abc import Callable
from typing import Any

VERSION: str
"""Of the nghttp2 that it was built with."""

# What `Session.feed` tells, by the first item of each tuple; the second is the stream's number.
CALL: int
"""(route, grpc-timeout, grpc-encoding, authorization, message, compressed): a call with its one message."""
OPEN: int
"""(route, grpc-timeout, grpc-encoding, authorization): a call whose messages follow."""
MESSAGE: int
"""(message, compressed)."""
END: int
"""No more messages."""
FAULT: int
"""(what, number, number): the request cannot be read."""
UNKNOWN: int
"""(path): no route is for this call."""
CLOSED: int
"""The caller has left before the answer's end was given."""
DRAINED: int
"""A stream of replies may go on."""
PONG: int
"""The client has seen the `notice`; stream 0."""

# What may be wrong with a request.
NO_MESSAGE: int
CUT: int
FLAGS: int
TOO_LARGE: int
SECOND: int
TOO_MUCH: int

class Limits:
    """Bounds of each connection; sizes in bytes.

    Attributes:
        message: of one request, as it is sent.
        requests: of requests that have not come whole, or that no handler has taken yet.
        replies: that wait for the caller's window.
        high_water: of replies that wait for one stream's window before its handler does.
        streams: calls at a time.
        stream_window: of one request that may be on their way.
        connection_window: of all requests.
        resets: calls that a client may cancel at once, and with `resets_rate` again per second.
    """

    message: int
    requests: int
    replies: int
    high_water: int
    streams: int
    stream_window: int
    connection_window: int
    resets: int
    resets_rate: int

class Door:
    """What the connections of one listener share."""

    def __init__(
        self,
        routes: list[tuple[str, bool]],
        limits: Limits,
        keys: bool,
        place: Callable[[int, bytes, int], memoryview | None] | None = None,
    ) -> None:
        """Args:
        routes: paths, and whether a call has a stream of requests. Calls name them by index.
        keys: whether calls are told with their `authorization`.
        place: asked where a large message goes: the call's route, the message's first bytes, its size. It returns
            a writable buffer of that size, which becomes the message, or None: the message becomes bytes.
        """

class Session:
    """One connection. It neither reads nor writes a socket.

    Methods for a call do nothing once its stream is gone. Not to be called from two threads.

    Attributes:
        over: nothing will come or go any more.
        wants_write: `take` has something to give.
        has_news: `news` has something to tell.
        waiting: bytes of replies that the client has no window for yet.
        streams: calls that are open.
    """

    def __init__(self, door: Door) -> None: ...
    @property
    def over(self) -> bool: ...
    @property
    def wants_write(self) -> bool: ...
    @property
    def has_news(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def streams(self) -> int: ...
    def feed(self, data: bytes, /) -> list[tuple[Any, ...]]:
        """Takes what arrived, and tells what it means."""

    def news(self) -> list[tuple[Any, ...]]:
        """What `take` or `expire` has brought about."""

    def take(self, limit: int, /) -> bytes | None:
        """What is to be sent now, a frame more than `limit` bytes at most; None for nothing."""

    def reply(self, stream: int, message: bytes | list[bytes | memoryview], /) -> bool:
        """The whole answer of a call, or its parts, one behind the other. False where too many bytes wait already; then
        nothing has been done."""

    def begin(self, stream: int, /) -> None:
        """The head of an answer whose messages follow."""

    def send(self, stream: int, message: bytes | list[bytes | memoryview], /) -> int:
        """A message of an answer. Gives the bytes that wait; above `high_water`, DRAINED will be told."""

    def finish(self, stream: int, status: int, text: bytes, headers: list[tuple[str, str]], /) -> None:
        """The end of an answer.

        Args:
            text: `grpc-message`, encoded; empty for none.
            headers: further ones, sent where the answer has not begun.
        """

    def took(self, stream: int, size: int, /) -> None:
        """A handler has taken the oldest message, of so many bytes."""

    def notice(self) -> None:
        """Asks the client to open no further call here."""

    def goaway(self) -> None:
        """Takes no further call. The session is over when those in flight are done."""

    def expire(self, read_timeout: float, write_timeout: float, min_rate: float, /) -> None:
        """Cuts calls that wait too long for their callers.

        Args:
            read_timeout: seconds for a call's one request, which may take longer by what its bytes take at `min_rate`.
            write_timeout: seconds in which a caller takes nothing of an answer that has its end.
            min_rate: bytes per second.
        """
