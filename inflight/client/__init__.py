"""The Python client: `Client` for scripts and threads, `AsyncClient` for asyncio, both over gRPC `Predict`; and
`MindsporeInferenceClient` for the language-model routes of MindSpore Serving 2.1."""

from inflight.client.aio import AsyncClient
from inflight.client.convert import Instance, Result
from inflight.client.llm import (
    InferenceResponse,
    InferenceStreamResponse,
    InferenceToken,
    MindsporeInferenceClient,
)
from inflight.client.ms_service import MSServiceServicer, MSServiceStub, add_MSServiceServicer_to_server
from inflight.client.options import SSLConfig
from inflight.client.sync import Client, ClientGrpcAsyncError, ClientGrpcAsyncResult

__all__ = [
    "AsyncClient",
    "Client",
    "ClientGrpcAsyncError",
    "ClientGrpcAsyncResult",
    "InferenceResponse",
    "InferenceStreamResponse",
    "InferenceToken",
    "Instance",
    "MSServiceServicer",
    "MSServiceStub",
    "MindsporeInferenceClient",
    "Result",
    "SSLConfig",
    "add_MSServiceServicer_to_server",
]
