"""Divides the processors of this machine between the replicas of a model."""

from __future__ import annotations

import os
from pathlib import Path

from inflight.config import processors

TOPOLOGY = Path("/sys/devices/system/cpu")


def shares(count: int, topology: Path = TOPOLOGY) -> list[tuple[int, ...]]:
    """The processors of this process in `count` equal parts that have none in common.

    Neighbours in the machine stay together: first by socket, then by core, so that two replicas share neither a core's
    arithmetic nor, where the sockets can be divided, a memory channel.

    Args:
        topology: the kernel's folder of processors.

    Returns:
        Empty where processors cannot be told apart: there are fewer than parts, or a quota gives this process time on
        all of them rather than some of them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < count or processors() < len(allowed):
        return []
    allowed.sort(key=lambda number: (*_place(topology / f"cpu{number}" / "topology"), number))
    size = len(allowed) // count
    return [tuple(allowed[part * size : (part + 1) * size]) for part in range(count)]


def _place(folder: Path) -> tuple[int, int]:
    """The socket and the core of a processor; (0, 0) where the kernel does not say."""
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0
