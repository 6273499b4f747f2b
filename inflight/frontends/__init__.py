"""The doors: HTTP and gRPC applications over one backend, and the base classes for a user's own protocol."""

from inflight.frontends.app import http_app, load_protocol
from inflight.frontends.base import Backend, predict
from inflight.frontends.control import Control
from inflight.frontends.door import Door
from inflight.frontends.grpc import grpc_app
from inflight.frontends.keys import Keys
from inflight.frontends.oip import Sequences
from inflight.frontends.routes import Access, Call, Events, Plain, Route

__all__ = [
    "Access",
    "Backend",
    "Call",
    "Control",
    "Door",
    "Events",
    "Keys",
    "Plain",
    "Route",
    "Sequences",
    "grpc_app",
    "http_app",
    "load_protocol",
    "predict",
]
