"""`inflight agents`: the agents of one machine for a distributed servable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from inflight import log
from inflight.commands.options import Command, Option, UsageError, configure_log
from inflight.config import AGENTS_SETTINGS, AgentsConfig, check_exposed, files, filled, one_of
from inflight.early import stop_cleanly
from inflight.errors import ConfigError
from inflight.startup import wait_until

EXAMPLES = """\
examples:
  inflight agents device0.mindir device1.mindir        two ranks, for a servable on this machine
  inflight agents part0.onnx,part1.onnx                one rank of two sub-graphs
  INFLIGHT_AGENTS_TOKEN=... inflight agents device2.mindir device3.mindir --agents-address 10.0.0.1:6200
"""

OPTIONS = (
    Option(
        "model-files",
        files,
        "The model file of each rank of this machine, in the order of the rank table; sub-graphs of one rank with "
        "commas.",
        default=(),
        metavar="FILES",
        many=True,
        positional=True,
    ),
    *(Option.of(each) for each in AGENTS_SETTINGS),
    Option(
        "log-level",
        one_of(*log.LEVEL_NAMES),
        "debug, info, warning or error, of the agents. Default warning, or what GLOG_v says.",
        metavar="LEVEL",
    ),
)


def config_of(values: Mapping[str, Any]) -> AgentsConfig:
    """The agents that the options describe.

    Raises:
        UsageError: options that do not go together.
    """
    if not values["model_files"]:
        raise UsageError("FILES is missing; write the model file of each rank of this machine")
    if (values["agent_ip"] is None) != (values["rank_start"] is None):
        raise UsageError("--agent-ip and --rank-start belong together; give both")
    runtimes = os.environ.get("INFLIGHT_RUNTIMES")
    config = filled(AgentsConfig, values, model_files=tuple(values["model_files"]), runtimes=runtimes)
    try:
        check_exposed(config.address, config.token)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return config


def run(values: Mapping[str, Any]) -> int:
    """Runs agents until SIGINT or SIGTERM, or with --once until one of them ends; returns 0."""
    stop_cleanly()
    configure_log(values["log_level"])
    config = config_of(values)
    from inflight.distributed import Launcher  # not imported for the help

    launcher = Launcher(config)
    launcher.start()
    wait_until(launcher.ended)
    return 0


COMMAND = Command(
    name="agents",
    summary="run this machine's ranks of a distributed servable",
    description="Runs the agents of one machine: the processes of a distributed servable's ranks, which `inflight "
    "serve --rank-table` waits for. They are started again for the servable's next group until Ctrl+C or SIGTERM.",
    examples=EXAMPLES,
    options=OPTIONS,
    run=run,
)
