"""Starts the processes of a language model's ranks, also before the server that they belong to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from inflight import early
from inflight.config import GeneratorConfig, processors
from inflight.contract import ShardJob
from inflight.errors import StartError
from inflight.link import LoadShard, Packer
from inflight.place.cores import shares
from inflight.place.local import Launch, WorkerProcess, open_log, start_worker


@dataclass(frozen=True)
class _Ahead:
    """A process that was started ahead and is not taken yet.

    Attributes:
        launch: its launch, without the arena files.
        job: the job that it was sent; None: it waits for one.
    """

    launch: Launch
    process: WorkerProcess
    job: ShardJob | None


_ahead: dict[tuple[str, int, int], _Ahead] = {}
"""By model, replica and rank."""


def shard_job(config: GeneratorConfig, rank: int, rendezvous: str = "", num_blocks: int | None = None) -> ShardJob:
    """The job of one rank of a model; `rendezvous` and `num_blocks` as in `ShardJob`."""
    job = ShardJob.of(config, rank, rendezvous, num_blocks)
    if config.replicas == 1:
        return job.on(max(1, processors() // config.tensor_parallel))
    cores = shares(config.replicas)
    mine = cores[config.replica] if cores else ()
    count = len(mine) or processors() // config.replicas
    return job.on(max(1, count // config.tensor_parallel), mine)


def rank_launch(config: GeneratorConfig, rank: int, log_dir: Path | None, file: int, append: bool) -> Launch:
    """The launch of a rank's process.

    Args:
        file: stands for both arena files, which ranks do not use.
    """
    place = f"replica{config.replica}_rank{rank}" if config.replica else f"rank{rank}"
    return Launch(
        label=early.rank_label(config.name, place),
        inbox=file,
        outbox=file,
        environment={"OMP_NUM_THREADS": str(config.model.threads)} if config.model.threads else {},
        log=None if log_dir is None else log_dir.absolute() / f"log_{config.name}_{place}.log",
        append=append,
    )


def start_ahead(config: GeneratorConfig, log_dir: Path | None, *, load: bool = True) -> None:
    """Starts the processes of a model's ranks while the server is still being imported. They begin their own imports.
    If the model is on this machine and a replica has one rank, this rank also begins to load it.

    The processes end with this process, or by `end_ahead`.

    Args:
        load: False: the ranks wait for their jobs. Several models must load one after the other, because each measures
            the memory that is left.

    Raises:
        StartError: a process could not be started.
    """
    if not hasattr(os, "memfd_create"):
        return
    for one in map(config.of_replica, range(config.least)):
        for rank in range(config.tensor_parallel):
            launch = rank_launch(one, rank, log_dir, -1, append=False)
            process = _begun(launch)
            job = shard_job(one, rank) if load and config.here and config.tensor_parallel == 1 else None
            if job is not None:
                process.socket.sendall(Packer().frame(LoadShard(job)))
            _ahead[config.name, one.replica, rank] = _Ahead(launch, process, job)


def _begun(launch: Launch) -> WorkerProcess:
    """Takes the process that `inflight.early` began, if it was started with this launch; else starts a new one."""
    begun = early.take(launch.label) if not launch.environment and launch.log is None else None
    if begun is None:
        try:
            with open_log(launch) as output:
                begun = early.spawn_rank(launch.label, launch.environment, output)
        except OSError as error:
            raise StartError(f"cannot start a worker process: {error}") from error
    return WorkerProcess(begun.process, begun.socket)


def start_rank(
    config: GeneratorConfig, job: ShardJob, log_dir: Path | None, file: int, append: bool
) -> tuple[WorkerProcess, bool]:
    """Takes the process that was started ahead for this job, or starts a new one.

    Returns:
        The process, and whether it was sent the job already.

    Raises:
        StartError: as `start_worker`.
    """
    ahead = _ahead.pop((config.name, config.replica, job.rank), None)
    if ahead is not None:
        if ahead.launch == rank_launch(config, job.rank, log_dir, -1, append) and ahead.job in (None, job):
            return ahead.process, ahead.job is not None
        ahead.process.end()
    return start_worker(rank_launch(config, job.rank, log_dir, file, append)), False


def end_ahead() -> None:
    """Ends all processes that were started ahead and not taken."""
    early.end()
    while _ahead:
        _ahead.popitem()[1].process.end()
