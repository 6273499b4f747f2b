"""`mindspore_serving.server.distributed`: the arguments are checked, and then refused with a clear text.

One model spread over several devices is not served yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from inflight.dropin.checks import check_bool, check_decryption, check_files, check_int, check_ints, check_str
from inflight.dropin.start_config import get_abs_path
from inflight.errors import ConfigError, RegistrationError, StartError

NOT_AVAILABLE = (
    "distributed servables (one model spread over several devices) are not available yet; declare the model with "
    "register.declare_model and start it with server.start_servables, which gives every device a replica of its own"
)
_LAST_START_PORT = 65535 - 7


class DistributedStartConfig:
    """A distributed servable to start, its arguments checked.

    Raises:
        ConfigError: (a RuntimeError) an argument has the wrong type or value.
    """

    def __init__(
        self,
        servable_directory: str,
        servable_name: str,
        rank_table_json_file: str,
        version_number: int,
        distributed_address: str,
        wait_agents_time_in_seconds: int,
    ) -> None:
        check_str("servable_directory", servable_directory)
        check_str("servable_name", servable_name)
        check_int("version_number", version_number, 0)
        check_str("rank_table_json_file", rank_table_json_file)
        check_str("distributed_address", distributed_address)
        check_int("wait_agents_time_in_seconds", wait_agents_time_in_seconds, 0)
        self.servable_directory = get_abs_path(servable_directory)
        self.servable_name = servable_name
        self.rank_table_json_file = get_abs_path(rank_table_json_file)
        self.version_number = version_number or 1
        self.distributed_address = distributed_address
        self.wait_agents_time_in_seconds = wait_agents_time_in_seconds


def refuse(config: DistributedStartConfig) -> NoReturn:
    """Raises StartError for a distributed servable."""
    raise StartError(f"Fail to start workers: servable '{config.servable_name}': {NOT_AVAILABLE}")


def declare_servable(
    rank_size: int,
    stage_size: int,
    with_batch_dim: bool = True,
    without_batch_dim_inputs: int | Sequence[int] | None = None,
    enable_pipeline_infer: bool = False,
) -> NoReturn:
    """Raises ConfigError for wrong arguments, and RegistrationError otherwise."""
    check_bool("with_batch_dim", with_batch_dim)
    check_bool("enable_pipeline_infer", enable_pipeline_infer)
    if without_batch_dim_inputs:
        check_ints("without_batch_dim_inputs", without_batch_dim_inputs, 0)
    check_int("rank_size", rank_size, 1)
    check_int("stage_size", stage_size, 1)
    raise RegistrationError(f"distributed.declare_servable: {NOT_AVAILABLE}")


def startup_agents(
    distributed_address: str,
    model_files: Sequence[str | list[str]],
    group_config_files: Sequence[str | list[str]] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
) -> NoReturn:
    """Raises ConfigError for wrong arguments or files that cannot be read, and StartError otherwise."""
    check_str("distributed_address", distributed_address)
    check_int("agent_start_port", agent_start_port, 1, _LAST_START_PORT)
    models = check_files("model_files", model_files)
    groups = () if group_config_files is None else check_files("group_config_files", group_config_files)
    check_decryption(dec_key, dec_mode)
    if (agent_ip is None) != (rank_start is None):
        raise ConfigError(
            "Parameter 'agent_ip' and parameter 'rank_start' must have values at the same time, "
            "or both None at the same time."
        )
    if agent_ip is not None:
        check_str("agent_ip", agent_ip)
        check_int("rank_start", rank_start, 0)
    _check_readable("model file", models)
    _check_readable("group config file", groups)
    raise StartError(f"Failed to start agents: {NOT_AVAILABLE}")


def _check_readable(what: str, files: tuple[tuple[str, ...], ...]) -> None:
    for file in (file for item in files for file in item):
        path = get_abs_path(file)
        if not os.access(path, os.R_OK):
            raise ConfigError(f"Cannot access {what} '{path}'")
