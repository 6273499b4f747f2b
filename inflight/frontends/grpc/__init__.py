"""The gRPC door: MindSpore Serving's Predict, the Open Inference Protocol, health and reflection."""

from inflight.frontends.grpc.app import grpc_app
from inflight.frontends.grpc.asgi import GrpcApp
from inflight.frontends.grpc.rpc import Rpc, StreamRpc, UnaryRpc
from inflight.frontends.grpc.status import GrpcError

__all__ = ["GrpcApp", "GrpcError", "Rpc", "StreamRpc", "UnaryRpc", "grpc_app"]
