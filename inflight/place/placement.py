"""Where the ranks of one replica run: the seam between the engine and this machine, or a cluster."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from inflight.config import GeneratorConfig
from inflight.contract import ShardJob
from inflight.link import create_file
from inflight.place.handle import Process
from inflight.place.local import WorkerProcess
from inflight.place.ranks import shard_job, start_rank


class PlacedRank(NamedTuple):
    """The process of one rank, its job, and whether it was told the job already."""

    process: Process
    job: ShardJob
    told: bool = False


class Placement(ABC):
    """Starts the ranks of one replica, as often as they are lost. One caller at a time.

    Attributes:
        elastic: `start` may wait for a machine with room for as long as it takes, and cancelling ends the wait.
    """

    elastic = False

    @abstractmethod
    async def start(self, config: GeneratorConfig, num_blocks: int | None, again: bool) -> Sequence[PlacedRank]:
        """Starts the processes of all ranks, in order.

        Args:
            config: of the replica.
            num_blocks: as in `ShardJob`.
            again: it was started before.

        Raises:
            StartError: a process could not be started.
        """

    @abstractmethod
    async def release(self) -> None:
        """Gives back what the processes took; called when all have ended, also before the next `start`."""

    @abstractmethod
    def close(self) -> None:
        """The replica is not started again, or not soon."""


class Here(Placement):
    """On this machine."""

    def __init__(self, log_dir: Path | None) -> None:
        self._log_dir = log_dir
        self._file: int | None = None

    async def start(self, config: GeneratorConfig, num_blocks: int | None, again: bool) -> Sequence[PlacedRank]:
        if self._file is None:
            self._file = create_file("inflight-unused", 4096)
        size = config.tensor_parallel
        rendezvous = f"127.0.0.1:{free_port()}" if size > 1 else ""
        started: list[WorkerProcess] = []
        placed: list[PlacedRank] = []
        try:
            for rank in range(size):
                job = shard_job(config, rank, rendezvous, num_blocks)
                process, told = start_rank(config, job, self._log_dir, self._file, append=again)
                started.append(process)
                placed.append(PlacedRank(process, job, told))
        except BaseException:
            for process in started:
                process.end()
            raise
        return placed

    async def release(self) -> None:
        return None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now. If another process takes it before rank 0 does, the start fails and is repeated."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
