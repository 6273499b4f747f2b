"""The Python client and the results of its asynchronous calls."""

from inflight.client import Client, ClientGrpcAsyncError, ClientGrpcAsyncResult, SSLConfig

__all__ = ["Client", "ClientGrpcAsyncError", "ClientGrpcAsyncResult", "SSLConfig"]
