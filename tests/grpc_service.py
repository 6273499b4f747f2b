"""A gRPC service whose handlers echo, wait, fail and stream, for the tests of calls and connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from inflight.errors import NotFound
from inflight.proto import health_pb2
from inflight.wire import GrpcApp, StreamRpc, UnaryRpc
from tests.grpc_server import MIB

Text = health_pb2.HealthCheckRequest

LIMIT = 40 * MIB


class Service:
    """Handlers that echo their text, and what became of them."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.yielded = 0
        self.timeouts: list[float | None] = []

    async def echo(self, request: Text, timeout: float | None) -> Text:
        self.timeouts.append(timeout)
        return request

    async def sleep(self, request: Text, timeout: float | None) -> Text:
        self.begun += 1
        try:
            await asyncio.sleep(float(request.service))
        finally:
            self.ended += 1
        return request

    async def linger(self, request: Text, timeout: float | None) -> Text:
        """Does not end when it is told to for the first time."""
        self.begun += 1
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(30)
        finally:
            self.ended += 1
        return request

    async def refuse(self, request: Text, timeout: float | None) -> Text:
        raise NotFound(bytes.fromhex(request.service).decode("utf-16", "surrogatepass"))

    async def crash(self, request: Text, timeout: float | None) -> Text:
        raise ZeroDivisionError(request.service)

    async def large(self, request: Text, timeout: float | None) -> Text:
        return Text(service="x" * int(request.service))

    async def count(self, request: Text, timeout: float | None) -> AsyncIterator[Text]:
        self.begun += 1
        try:
            for number in range(int(request.service)):
                yield Text(service=f"{number}" + "x" * 10_000)
                self.yielded += 1
                await asyncio.sleep(0)
        finally:
            self.ended += 1

    async def chat(self, requests: AsyncIterator[Text], timeout: float | None) -> AsyncIterator[Text]:
        self.begun += 1
        try:
            async for request in requests:
                yield request
        finally:
            self.ended += 1

    def app(self) -> GrpcApp:
        names = ("echo", "sleep", "linger", "refuse", "crash", "large")
        unary = {name: UnaryRpc(Text.FromString, getattr(self, name)) for name in names}
        streams = {
            "count": StreamRpc(Text.FromString, handler=self.count),
            "chat": StreamRpc(Text.FromString, duplex=self.chat),
        }
        rpcs = {f"/test.Service/{name}": rpc for name, rpc in {**unary, **streams}.items()}
        return GrpcApp(rpcs, max_message_bytes=LIMIT)


def unary(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(f"/test.Service/{name}", Text.SerializeToString, Text.FromString)
