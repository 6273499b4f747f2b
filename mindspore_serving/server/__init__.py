"""Starts and stops servables and their doors."""

from mindspore_serving.server import common, distributed, master, register, worker
from mindspore_serving.server._server import ServableStartConfig, start_servables
from mindspore_serving.server.master import SSLConfig, start_grpc_server, start_restful_server, stop

__all__ = [
    "SSLConfig",
    "ServableStartConfig",
    "common",
    "distributed",
    "master",
    "register",
    "start_grpc_server",
    "start_restful_server",
    "start_servables",
    "stop",
    "worker",
]
