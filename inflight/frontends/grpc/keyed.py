"""Remote procedures whose calls belong to the holder of an API key."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from google.protobuf.message import Message

from inflight.admission import holder
from inflight.frontends.keys import Key, Keys
from inflight.wire import Rpc, StreamRpc, bearer, close_replies


def admission(keys: Keys) -> Callable[[Rpc, bytes | None], Rpc]:
    """What `GrpcApp` asks for every call of a model."""

    def admit(rpc: Rpc, authorization: bytes | None) -> Rpc:
        key = keys.find(bearer(authorization))
        return _streams(rpc, key) if isinstance(rpc, StreamRpc) else _unary(rpc, key)

    return admit


def _unary(rpc: Any, key: Key) -> Rpc:
    begins = rpc.begin

    async def handler(request: Any, timeout: float | None) -> Message:
        ticket = key.enter()
        token = holder.set(key)
        try:
            work = rpc.handler(request, timeout)
            del request  # it may be large, and the work may take long
            reply: Message = await work
            return reply
        finally:
            holder.reset(token)
            ticket.leave()

    def begin(
        request: Any, timeout: float | None, done: Callable[[Message | Exception], None]
    ) -> Callable[[], None] | None:
        token = holder.set(key)
        try:
            cancel: Callable[[], None] | None = begins(request, timeout, done)
        finally:
            holder.reset(token)
        if cancel is not None:
            key.count()
        return cancel

    # A limited call is watched until its end, which a handler can do.
    made: Rpc = replace(rpc, handler=handler, begin=begin if begins is not None and not key.limited else None)
    return made


def _streams(rpc: StreamRpc, key: Key) -> Rpc:
    async def replies(make: Any, request: Any, timeout: float | None) -> AsyncGenerator[Message, None]:
        ticket = key.enter()
        holder.set(key)  # not reset: a generator may end in another context than it began in
        inner: AsyncIterator[Message] = make(request, timeout)
        del request
        try:
            async for reply in inner:
                yield reply
        finally:
            ticket.leave()
            await close_replies(inner)

    def with_one(request: Any, timeout: float | None) -> AsyncIterator[Message]:
        return replies(rpc.handler, request, timeout)

    def with_many(requests: AsyncIterator[Any], timeout: float | None) -> AsyncIterator[Message]:
        return replies(rpc.duplex, requests, timeout)

    return StreamRpc(rpc.parse, with_one if rpc.handler else None, with_many if rpc.duplex else None)
