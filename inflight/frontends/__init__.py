"""The doors: HTTP and gRPC applications over one backend, and the sockets they listen on."""

from inflight.frontends.address import GRPC, RESTFUL, Kind, parse_address
from inflight.frontends.app import http_app
from inflight.frontends.base import Backend
from inflight.frontends.grpc import grpc_app
from inflight.frontends.listen import Listener, listen_grpc, listen_http, success_line

__all__ = [
    "GRPC",
    "RESTFUL",
    "Backend",
    "Kind",
    "Listener",
    "grpc_app",
    "http_app",
    "listen_grpc",
    "listen_http",
    "parse_address",
    "success_line",
]
