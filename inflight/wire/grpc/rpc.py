"""The remote procedures of a gRPC service, as data."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from inflight.admission import Arrival, Caller
from inflight.wire.grpc.status import INTERNAL, GrpcError

Unary: TypeAlias = "Callable[[Any, float | None], Awaitable[Message]]"
"""Request and the caller's time-out in seconds (None: none) to reply."""
Begin: TypeAlias = "Callable[[Any, float | None, Callable[[Message | Exception], None]], Callable[[], None] | None]"
Go: TypeAlias = "Callable[[Arrival | None], None]"
"""Called once, when the turn of a held call has come, with the place that is kept for it; None: the call is refused."""
Hold: TypeAlias = "Callable[[Any, Callable[[], object], Go], Caller | None]"
"""Holds a call whose language model has no free place. Args: the request; a function that names the connection; the
callback at its turn. Returns the caller in the model's line, to be taken out if the call ends before; None: the call
need not wait."""
ServerStream: TypeAlias = "Callable[[Any, float | None], AsyncIterator[Message]]"
Bidirectional: TypeAlias = "Callable[[AsyncIterator[Any], float | None], AsyncIterator[Message]]"

peer: ContextVar[Callable[[], object] | None] = ContextVar("peer", default=None)
"""Names the connection of the call that a task serves."""


@dataclass(frozen=True)
class UnaryRpc:
    """One request, one reply.

    Attributes:
        parse: makes the request's message of its bytes.
        begin: `handler` without a task, for engines that can do without one: it begins the work, which calls back once
            with the reply or the error. Returns a function that cancels it; None: nothing was begun, the request is
            for `handler`. It raises as `handler` does.
        hold: makes the call wait for a place before its handler runs, for engines that can do so without a task; with
            others the handler waits.
        refusal: makes the reply to a held call that is refused; None: a status refuses it.
    """

    parse: Callable[[bytes], Message]
    handler: Unary
    begin: Begin | None = None
    hold: Hold | None = None
    refusal: Callable[[Any], Message] | None = None


@dataclass(frozen=True)
class StreamRpc:
    """A stream of replies, to one request or to a stream of them. A handler is cancelled when its caller leaves.

    Attributes:
        parse: makes a request's message of its bytes.
        handler: for one request.
        duplex: for a stream of requests; exactly one of the two is given.
    """

    parse: Callable[[bytes], Message]
    handler: ServerStream | None = None
    duplex: Bidirectional | None = None


Rpc: TypeAlias = "UnaryRpc | StreamRpc"


def parse(rpc: Rpc, data: bytes) -> Message:
    """A request's message.

    Raises:
        GrpcError: INTERNAL, the bytes are no such message.
    """
    try:
        return rpc.parse(data)
    except DecodeError as error:
        raise GrpcError(INTERNAL, f"Exception deserializing request! {error}") from None


async def close(replies: AsyncIterator[Message]) -> None:
    """Lets a handler run its `finally` now, whatever ended the stream."""
    aclose = getattr(replies, "aclose", None)
    if aclose is not None:
        await aclose()
