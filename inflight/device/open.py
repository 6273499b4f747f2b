"""Devices by name: where tensors live, how much room there is, how ranks talk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from inflight.errors import StartError

CGROUP_STAT = "/sys/fs/cgroup/memory.stat"


class Device(ABC):
    """One device of one kind.

    Attributes:
        torch: what tensors are made on.
        collectives: the torch.distributed backend between ranks on such devices.
    """

    torch: torch.device
    collectives: str

    @abstractmethod
    def available_memory(self) -> int:
        """Bytes that are free now."""

    def set_threads(self, count: int) -> None:
        """CPU threads of this process's operators."""
        torch.set_num_threads(count)


class _Cpu(Device):
    collectives = "gloo"

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def available_memory(self) -> int:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        for line in _lines("/proc/meminfo"):
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
        limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
        if limit and used and limit[0].isdigit():
            # Files that were read once, like the weights, count as used and give way to whoever needs the memory.
            files = [int(line.split()[1]) for line in _lines(CGROUP_STAT) if line.startswith("inactive_file ")]
            free = min(free, max(0, int(limit[0]) - int(used[0]) + sum(files)))
        return free


class _Cuda(Device):
    collectives = "nccl"

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        torch.cuda.set_device(self.torch)

    def available_memory(self) -> int:
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self.torch)[0]
        return free


class _Npu(Device):
    """Ascend, through torch_npu."""

    collectives = "hccl"

    def __init__(self, index: int) -> None:
        self.torch = torch.device("npu", index)
        torch.npu.set_device(self.torch)

    def available_memory(self) -> int:
        torch.npu.empty_cache()
        free: int = torch.npu.mem_get_info(self.torch)[0]
        return free


def open_device(device_type: str | None, device_id: int) -> Device:
    """The device of that kind and number; None is the best kind here.

    Raises:
        StartError: it is not there; the text says which are.
    """
    counts = {"cuda": _count_cuda(), "npu": _count_npu(), "cpu": 1}
    kind = device_type or next(kind for kind, count in counts.items() if count)
    if kind not in counts:
        raise StartError(f"device type '{kind}' is unknown; use cpu, cuda or npu")
    if kind == "cpu":
        return _Cpu()
    if device_id >= counts[kind]:
        here = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise StartError(f"device {kind}:{device_id} is not there; this machine has {here}")
    return _Cuda(device_id) if kind == "cuda" else _Npu(device_id)


def _count_cuda() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _count_npu() -> int:
    try:
        import torch_npu  # noqa: F401 - registers torch.npu
    except ImportError:
        return 0
    count: int = torch.npu.device_count()
    return count


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
