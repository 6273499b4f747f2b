"""The implementation of `mindspore_serving.server`: its start-up functions, on top of `inflight.server`.

A servable_config.py imports `mindspore_serving.server` inside every worker, so nothing here imports the server, a
web framework or gRPC before a server is started.
"""

from inflight.dropin.checks import check_bool, check_files, check_int, check_ints, check_ip_port, check_str, check_strs
from inflight.dropin.devices import device_types_here
from inflight.dropin.distributed import DistributedStartConfig, startup_agents
from inflight.dropin.log import debug, error, get_level, get_log_config, info, warning
from inflight.dropin.process import (
    SSLConfig,
    at_stop_list,
    only_model_stage,
    set_max_enqueued_requests,
    start_grpc_server,
    start_master_server,
    start_restful_server,
    start_servable,
    start_servables,
    stop,
    stop_on_except,
)
from inflight.dropin.start_config import ServableStartConfig, get_abs_path, get_newest_version_number, merge_config

__all__ = [
    "DistributedStartConfig",
    "SSLConfig",
    "ServableStartConfig",
    "at_stop_list",
    "check_bool",
    "check_files",
    "check_int",
    "check_ints",
    "check_ip_port",
    "check_str",
    "check_strs",
    "debug",
    "device_types_here",
    "error",
    "get_abs_path",
    "get_level",
    "get_log_config",
    "get_newest_version_number",
    "info",
    "merge_config",
    "only_model_stage",
    "set_max_enqueued_requests",
    "start_grpc_server",
    "start_master_server",
    "start_restful_server",
    "start_servable",
    "start_servables",
    "startup_agents",
    "stop",
    "stop_on_except",
    "warning",
]
