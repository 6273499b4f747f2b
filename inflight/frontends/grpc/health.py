"""`grpc.health.v1.Health`, for probes and load balancers.

The service "" and every gRPC service here are SERVING while the server is ready; a servable's name stands for that
servable's newest version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from inflight.errors import Unavailable
from inflight.frontends.base import Backend
from inflight.proto.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)
from inflight.wire import NOT_FOUND, GrpcError, Rpc, StreamRpc, UnaryRpc

SERVICE = "grpc.health.v1.Health"
WATCH_INTERVAL = 0.25
"""Seconds between two polls of a watched service; the backend does not report changes."""

_SERVING = HealthCheckResponse.SERVING
_NOT_SERVING = HealthCheckResponse.NOT_SERVING
_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN


def health_rpcs(backend: Backend, services: Iterable[str]) -> dict[str, Rpc]:
    """The service's procedures by path.

    Args:
        services: names of the gRPC services whose status is the server's.
    """
    always = ("", *services, SERVICE)

    def statuses() -> dict[str, HealthCheckResponse.ServingStatus]:
        """Every service's status, by name."""
        live = backend.live
        newest = {status.name: status for status in sorted(backend.servables(), key=lambda each: each.version)}
        found = {name: _SERVING if live and status.ready else _NOT_SERVING for name, status in newest.items()}
        return found | dict.fromkeys(always, _SERVING if live and backend.ready else _NOT_SERVING)

    async def check(request: HealthCheckRequest, _timeout: float | None) -> HealthCheckResponse:
        status = statuses().get(request.service)
        if status is None:
            raise GrpcError(NOT_FOUND, f"unknown service '{request.service}', ask for '' or a servable's name")
        return HealthCheckResponse(status=status)

    async def list_all(_request: HealthListRequest, _timeout: float | None) -> HealthListResponse:
        reply = HealthListResponse()
        for name, status in statuses().items():
            reply.statuses[name].status = status
        return reply

    async def watch(request: HealthCheckRequest, _timeout: float | None) -> AsyncIterator[HealthCheckResponse]:
        last = None
        while True:
            status = statuses().get(request.service, _UNKNOWN)
            if status != last:
                last = status
                yield HealthCheckResponse(status=status)
            elif not backend.live:  # the stream must not hold up the end of the connection
                raise Unavailable("the server is stopping")
            await asyncio.sleep(WATCH_INTERVAL)

    return {
        f"/{SERVICE}/Check": UnaryRpc(HealthCheckRequest.FromString, check),
        f"/{SERVICE}/List": UnaryRpc(HealthListRequest.FromString, list_all),
        f"/{SERVICE}/Watch": StreamRpc(HealthCheckRequest.FromString, handler=watch),
    }
