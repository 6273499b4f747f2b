"""Starts the server's doors and stops the server."""

from inflight.dropin import (
    SSLConfig,
    at_stop_list,
    only_model_stage,
    start_grpc_server,
    start_master_server,
    start_restful_server,
    stop,
    stop_on_except,
)
from mindspore_serving.server.master import context

__all__ = [
    "SSLConfig",
    "at_stop_list",
    "context",
    "only_model_stage",
    "start_grpc_server",
    "start_master_server",
    "start_restful_server",
    "stop",
    "stop_on_except",
]
