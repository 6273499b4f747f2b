"""The configuration of a distributed servable's ranks, and of the agents of one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from inflight.config.parse import address, files, key_file, local, one_of, present, seconds, switch, token, whole
from inflight.config.setting import Reticent, Setting, fields_of
from inflight.errors import ConfigError

DEFAULT_AGENTS = "127.0.0.1:6200"
LAST_START_PORT = 65535 - 7

DecKey = Annotated[
    bytes | None,
    Setting("File with the key of encrypted model files.", key_file, "FILE", None, flag="dec-key-file"),
]
DecMode = Annotated[str, Setting("How they are encrypted.", one_of("AES-GCM", "AES-CBC"), "MODE")]
DeviceType = Annotated[
    str | None, Setting("cpu, gpu or ascend.", one_of("cpu", "gpu", "ascend"), "TYPE", ": the back end's choice")
]

_Token = Annotated[
    str | None,
    Setting(
        "What a distributed servable and its agents show each other, 16 characters at least; needed beyond this "
        "machine. Better said as a variable or in a file: others see a command line.",
        token,
        "TOKEN",
        ": none",
        flag="agents-token",
        secret=True,
    ),
]
_Tls = Annotated[
    bool,
    Setting(
        "With a token: do not encrypt connections between a distributed servable and its agents.",
        switch,
        flag="agents-plain",
        opposite=True,
    ),
]


class RanksConfig(Reticent, frozen=True):
    """The agents of a distributed servable.

    Attributes:
        rank_table: the file that says which rank runs where; absolute.
        address: `ip:port` where the agents come.
        wait_seconds: how long to wait until all of them have come; 0: no limit.
        replay: batches that a lost group had run again on the next one; else they fail.
        token: what the agents must know; None: whoever reaches the address can take part.
        tls: their connections are encrypted, where there is a token.
    """

    rank_table: Annotated[
        Path,
        Setting(
            "Rank table of a distributed servable: which rank runs on which machine. Its agents come with: inflight "
            "agents.",
            present,
            "FILE",
            None,
        ),
    ]
    address: Annotated[
        str,
        Setting("ip:port where the agents of a distributed servable come.", address, "ADDRESS", flag="agents-address"),
    ] = DEFAULT_AGENTS
    wait_seconds: Annotated[
        float,
        Setting(
            "Seconds to wait until all agents have come. 0: no limit.", seconds, "SECONDS", " 0", flag="agents-wait"
        ),
    ] = 0.0
    replay: bool = True
    token: _Token = None
    tls: _Tls = True

    @property
    def exposed(self) -> bool:
        """Whether strangers of other machines can take part."""
        return self.token is None and not local(self.address)


class AgentsConfig(Reticent, frozen=True):
    """The agents of one machine.

    Attributes:
        address: of the distributed servable's worker.
        model_files: of each local rank the files of its sub-graphs, absolute.
        group_files: of each local rank its file of communication groups, or none at all.
        start_port: names the agents: `<ip>:<start_port + local index>`.
        agent_ip, rank_start: local ranks are those with the table's address of rank `rank_start`; None: those whose
            address is one of this machine's.
        device_type: None: the back end's choice.
        runtimes: value of INFLIGHT_RUNTIMES.
        restart: when an agent ends, all are started again, for the next group; else the launcher ends with them.
        token, tls: as the worker's.
    """

    address: Annotated[
        str,
        Setting(
            "ip:port where the distributed servable waits for its agents.", address, "ADDRESS", flag="agents-address"
        ),
    ] = DEFAULT_AGENTS
    model_files: tuple[tuple[str, ...], ...] = ()
    group_files: Annotated[
        tuple[tuple[str, ...], ...],
        Setting(
            "File of a rank's communication groups, as MindSpore writes it; once for each rank of this machine.",
            files,
            "FILE",
            ": none",
            flag="group-config-file",
            many=True,
        ),
    ] = ()
    start_port: Annotated[
        int,
        Setting(
            "Names the agents, from this port on: ip:port.", whole(1, LAST_START_PORT), "N", flag="agent-start-port"
        ),
    ] = 7000
    agent_ip: Annotated[
        str | None,
        Setting(
            "This machine's address where the rank table has another one for it; with --rank-start.",
            str,
            "IP",
            ": as in the rank table",
        ),
    ] = None
    rank_start: Annotated[
        int | None,
        Setting(
            "This machine's ranks are those with the rank table's address of this rank; with --agent-ip.",
            whole(0),
            "N",
            None,
        ),
    ] = None
    dec_key: DecKey = None
    dec_mode: DecMode = "AES-GCM"
    device_type: DeviceType = None
    runtimes: str | None = None
    restart: Annotated[
        bool,
        Setting(
            "End when an agent or the servable ends, instead of starting all agents again.",
            switch,
            flag="once",
            opposite=True,
        ),
    ] = True
    token: _Token = None
    tls: _Tls = True


def check_exposed(where: str, secret: str | None) -> None:
    """Raises ConfigError where agents would come from other machines without a token."""
    if secret is None and not local(where):
        raise ConfigError(
            f"whoever reaches {where} could take part in the model: give the servable and its agents one token "
            "(INFLIGHT_AGENTS_TOKEN, made with: openssl rand -hex 32), or write an address of this machine alone, as "
            f"--agents-address {DEFAULT_AGENTS}"
        )


AGENTS_SETTINGS = fields_of(AgentsConfig)
"""All settings of `inflight agents`."""
