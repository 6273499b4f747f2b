"""The remote procedures of a gRPC service, as data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from inflight.admission import Arrival, Caller
from inflight.wire.grpc.status import INTERNAL, GrpcError


class Encoded:
    """A reply that is encoded already, as parts that lie one behind the other.

    Attributes:
        parts: arrays' memory among them, which nobody changes any more.
    """

    __slots__ = ("parts", "size")

    def __init__(self, parts: list[bytes | memoryview]) -> None:
        self.parts = parts
        self.size = sum(len(part) for part in parts)

    def SerializeToString(self) -> bytes:
        """A copy of the whole, as of a message."""
        return b"".join(self.parts)


Reply: TypeAlias = "Message | Encoded"
Unary: TypeAlias = "Callable[[Any, float | None], Awaitable[Reply]]"
"""A handler: takes a request and the caller's time-out in seconds (None: none), returns the reply."""
Begin: TypeAlias = "Callable[[Any, float | None, Callable[[Reply | Exception], None]], Callable[[], None] | None]"
Go: TypeAlias = "Callable[[Arrival | None], None]"
"""Called once at the turn of a held call, with the place reserved for it; None: the call is refused."""
Hold: TypeAlias = "Callable[[Any, Callable[[], object], Go], Caller | None]"
"""Holds a call whose language model has no free place. Args: the request; a function that names the connection; the
callback at its turn. Returns the caller in the model's line, to be taken out if the call ends before; None: the call
need not wait."""
ServerStream: TypeAlias = "Callable[[Any, float | None], AsyncIterator[Reply]]"
Bidirectional: TypeAlias = "Callable[[AsyncIterator[Any], float | None], AsyncIterator[Reply]]"
Layout: TypeAlias = "Callable[[bytes], int | None]"
"""Finds in a large message's first bytes where its first tensor begins; None: it has none there. A procedure with a
layout parses such messages from a memoryview, in shared memory where there is room."""

peer: ContextVar[Callable[[], object] | None] = ContextVar("peer", default=None)
"""Names the connection of the call that a task serves."""


@dataclass(frozen=True)
class UnaryRpc:
    """One request, one reply.

    Attributes:
        parse: parses the request's bytes, or a memoryview of them if it has a layout.
        begin: alternative to `handler` for engines that need no task: it begins the work, which calls back once with
            the reply or the error. Returns a function that cancels it; None: nothing was begun, and `handler` must
            serve the request. Raises as `handler` does.
        hold: makes the call wait for a place before its handler runs, in engines that can do so without a task; in
            others the handler waits.
        refusal: makes the reply to a held call that is refused; None: a status refuses it.
        layout: see `Layout`.
    """

    parse: Callable[[Any], Any]
    handler: Unary
    begin: Begin | None = None
    hold: Hold | None = None
    refusal: Callable[[Any], Message] | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class StreamRpc:
    """A stream of replies, to one request or to a stream of them. A handler is cancelled when its caller leaves.

    Attributes:
        parse: parses a request's bytes, or a memoryview of them if it has a layout.
        handler: for one request.
        duplex: for a stream of requests; exactly one of the two is given.
        layout: see `Layout`.
    """

    parse: Callable[[Any], Any]
    handler: ServerStream | None = None
    duplex: Bidirectional | None = None
    layout: Layout | None = None


Rpc: TypeAlias = "UnaryRpc | StreamRpc"


def parse(rpc: Rpc, data: bytes | memoryview) -> Any:
    """A request's message.

    Raises:
        GrpcError: INTERNAL, the bytes are not such a message.
    """
    try:
        return rpc.parse(data)
    except DecodeError as error:
        raise GrpcError(INTERNAL, f"Exception deserializing request! {error}") from None


async def close_replies(replies: AsyncIterator[Reply]) -> None:
    """Closes a handler's stream, so that its `finally` runs now."""
    aclose = getattr(replies, "aclose", None)
    if aclose is not None:
        await aclose()
