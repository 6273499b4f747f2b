"""The gRPC door: MindSpore Serving's Predict, the Open Inference Protocol, health and reflection."""

from inflight.frontends.grpc.app import grpc_app

__all__ = ["grpc_app"]
