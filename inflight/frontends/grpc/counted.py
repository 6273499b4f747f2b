"""Remote procedures whose calls are counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from inflight.errors import InflightError
from inflight.metrics import Calls, RouteMetrics
from inflight.wire import GrpcError, Reply, Rpc, StreamRpc, UnaryRpc, close_replies

_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
"""Names of gRPC's statuses, by number."""


def counted(rpcs: Mapping[str, Rpc], metrics: RouteMetrics) -> dict[str, Rpc]:
    """The same procedures, with counted calls. A call that was held and refused before it began is not counted.

    Args:
        rpcs: by path, `/service/method`.
    """
    found: dict[str, Rpc] = {}
    for path, rpc in rpcs.items():
        _, service, method = path.split("/")
        calls = metrics.grpc(service, method)
        found[path] = _streams(rpc, calls) if isinstance(rpc, StreamRpc) else _unary(rpc, calls)
    return found


def _unary(rpc: Any, calls: Calls) -> Rpc:
    begins = rpc.begin

    async def handler(request: Any, timeout: float | None) -> Reply:
        began, code = time.perf_counter(), "OK"
        work = rpc.handler(request, timeout)
        del request  # it may be large, and the work may take long
        try:
            reply: Reply = await work
        except BaseException as error:
            code = _code(error)
            raise
        finally:
            calls.done(code, time.perf_counter() - began)
        return reply

    def begin(
        request: Any, timeout: float | None, done: Callable[[Reply | Exception], None]
    ) -> Callable[[], None] | None:
        began = time.perf_counter()

        def told(result: Reply | Exception) -> None:
            code = _code(result) if isinstance(result, Exception) else "OK"
            calls.done(code, time.perf_counter() - began)
            done(result)

        try:
            cancel: Callable[[], None] | None = begins(request, timeout, told)
        except Exception as error:
            calls.done(_code(error), time.perf_counter() - began)
            raise
        return cancel

    made: UnaryRpc = replace(rpc, handler=handler, begin=begin if begins is not None else None)
    return made


def _streams(rpc: StreamRpc, calls: Calls) -> Rpc:
    async def replies(handler: Any, request: Any, timeout: float | None) -> AsyncGenerator[Reply, None]:
        began, code = time.perf_counter(), "OK"
        inner: AsyncIterator[Reply] = handler(request, timeout)
        del request
        try:
            async for reply in inner:
                yield reply
        except BaseException as error:
            code = _code(error)
            raise
        finally:
            calls.done(code, time.perf_counter() - began)
            await close_replies(inner)

    def with_one(request: Any, timeout: float | None) -> AsyncIterator[Reply]:
        return replies(rpc.handler, request, timeout)

    def with_many(requests: AsyncIterator[Any], timeout: float | None) -> AsyncIterator[Reply]:
        return replies(rpc.duplex, requests, timeout)

    return replace(rpc, handler=with_one if rpc.handler else None, duplex=with_many if rpc.duplex else None)


def _code(error: BaseException) -> str:
    if isinstance(error, GrpcError):
        return _CODES[error.code]
    if isinstance(error, InflightError):
        return _CODES[error.grpc_code]
    return "CANCELLED" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else "INTERNAL"
