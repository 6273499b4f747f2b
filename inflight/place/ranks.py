"""The processes of a language model's ranks, and their start ahead of the server that they belong to."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from inflight.config import GeneratorConfig
from inflight.place.local import Launch, WorkerProcess, start_worker

_ahead: dict[tuple[str, int], tuple[Launch, WorkerProcess]] = {}
"""Processes that nobody has taken yet, by model and rank."""


def rank_launch(config: GeneratorConfig, rank: int, log_dir: Path | None, file: int, append: bool) -> Launch:
    """How a rank's process is started.

    Args:
        file: an arena file; ranks get tokens, which need no shared memory.
    """
    return Launch(
        label=("--rank", f"--servable_name={config.name}", f"--device_id=rank{rank}"),
        inbox=file,
        outbox=file,
        environment={"OMP_NUM_THREADS": str(config.model.threads)} if config.model.threads else {},
        log=None if log_dir is None else log_dir.absolute() / f"log_{config.name}_rank{rank}.log",
        append=append,
    )


def start_ahead(config: GeneratorConfig, log_dir: Path | None) -> None:
    """Starts the processes of a model's ranks, for a server that is still being imported; they import their own part.

    They end with this process, or by `end_ahead`.

    Raises:
        StartError: a process could not be started.
    """
    if not hasattr(os, "memfd_create"):
        return
    for rank in range(config.tensor_parallel):
        file = os.memfd_create("inflight-unused", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, 4096)
            launch = rank_launch(config, rank, log_dir, file, append=False)
            _ahead[config.name, rank] = launch, start_worker(launch)
        finally:
            os.close(file)


def start_rank(config: GeneratorConfig, rank: int, log_dir: Path | None, file: int, append: bool) -> WorkerProcess:
    """A rank's process: the one that was started ahead as this one would be, else a new one.

    Raises:
        StartError: as `start_worker`.
    """
    launch = rank_launch(config, rank, log_dir, file, append)
    ahead = _ahead.pop((config.name, rank), None)
    if ahead is not None:
        if dataclasses.replace(ahead[0], inbox=file, outbox=file) == launch:
            return ahead[1]
        ahead[1].end()
    return start_worker(launch)


def end_ahead() -> None:
    """Ends the processes that nobody took."""
    while _ahead:
        _ahead.popitem()[1][1].end()
