"""The gRPC binding of `MSService`."""

from inflight.client import MSServiceServicer, MSServiceStub, add_MSServiceServicer_to_server

__all__ = ["MSServiceServicer", "MSServiceStub", "add_MSServiceServicer_to_server"]
