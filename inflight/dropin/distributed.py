"""`mindspore_serving.server.distributed`: one model spread over the agents of several devices and machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inflight.config import AgentsConfig, RanksConfig, ServableConfig, switch
from inflight.dropin.checks import check_decryption, check_files, check_int, check_str
from inflight.dropin.log import ensure_configured
from inflight.dropin.start_config import get_abs_path
from inflight.errors import ConfigError
from inflight.servable import check_config_location

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

    def to_servable_config(self) -> ServableConfig:
        """The server's own configuration.

        Raises:
            ConfigError: there is no such servable.
        """
        check_config_location(Path(self.servable_directory), self.servable_name)
        return ServableConfig(
            directory=Path(self.servable_directory),
            name=self.servable_name,
            device_ids=(),
            version=self.version_number,
            ranks=RanksConfig(
                Path(self.rank_table_json_file),
                self.distributed_address,
                self.wait_agents_time_in_seconds,
                replay=False,
                **_secured(),
            ),
        )


def startup_agents(
    distributed_address: str,
    model_files: Sequence[str | list[str]],
    group_config_files: Sequence[str | list[str]] | None = None,
    agent_start_port: int = 7000,
    agent_ip: str | None = None,
    rank_start: int | None = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
) -> None:
    """Starts the agents of this machine, one process for each local rank, and returns when all have registered. They,
    and a thread of this process, live until one of them ends, the distributed servable ends, or SIGINT or SIGTERM.

    Args:
        distributed_address: of the distributed servable; its rank table says which ranks are this machine's.
        model_files: one item for each local rank: a file, or a list of files, the sub-graphs. Relative to the script
            that was started.
        group_config_files: one file for each local rank, for MindSpore: its communication groups.
        agent_start_port: agents are named by `<ip>:<agent_start_port + local index>`.
        agent_ip, rank_start: both or none: the machine's address is `agent_ip`, and its ranks are those that have the
            same address in the rank table as rank `rank_start`.
        dec_key, dec_mode: key of encrypted model files.

    Raises:
        ConfigError, StartError: (RuntimeErrors) wrong arguments, files that do not fit the rank table or cannot be
            read, no answer from the worker, or an agent's own error; no agent is left running.
    """
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
    ensure_configured()
    # Workers import this module and never start agents.
    from inflight.distributed import Launcher

    config = AgentsConfig(
        address=distributed_address,
        model_files=_absolute(models),
        group_files=_absolute(groups),
        start_port=agent_start_port,
        agent_ip=agent_ip,
        rank_start=rank_start,
        dec_key=dec_key,
        dec_mode=dec_mode,
        runtimes=os.environ.get("INFLIGHT_RUNTIMES"),
        restart=False,
        **_secured(),
    )
    Launcher(config).start()


def _secured() -> dict[str, Any]:
    """The settings that MindSpore Serving's functions have no parameters for.

    Raises:
        ConfigError: a variable with another value.
    """
    try:
        plain = switch(os.environ.get("INFLIGHT_AGENTS_PLAIN", ""))
    except ValueError as error:
        raise ConfigError(f"INFLIGHT_AGENTS_PLAIN: {error}") from None
    return {"token": os.environ.get("INFLIGHT_AGENTS_TOKEN"), "tls": not plain}


def _absolute(files: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(get_abs_path(file) for file in item) for item in files)
