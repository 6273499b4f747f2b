"""The Python client: `Client` for scripts and threads, `AsyncClient` for asyncio. Both speak gRPC `Predict`."""

from inflight.client.aio import AsyncClient
from inflight.client.convert import Instance, Result
from inflight.client.ms_service import MSServiceServicer, MSServiceStub, add_MSServiceServicer_to_server
from inflight.client.options import SSLConfig
from inflight.client.sync import Client, ClientGrpcAsyncError, ClientGrpcAsyncResult

__all__ = [
    "AsyncClient",
    "Client",
    "ClientGrpcAsyncError",
    "ClientGrpcAsyncResult",
    "Instance",
    "MSServiceServicer",
    "MSServiceStub",
    "Result",
    "SSLConfig",
    "add_MSServiceServicer_to_server",
]
