"""The doors: HTTP and gRPC applications over one backend."""

from inflight.frontends.app import http_app
from inflight.frontends.base import Backend
from inflight.frontends.grpc import grpc_app

__all__ = ["Backend", "grpc_app", "http_app"]
