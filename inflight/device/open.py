"""Devices by name: torch's device, free memory, and the backend of collective operations.

torch is imported where a device or a model needs it: a CPU on which the native engine computes does without.
"""

from __future__ import annotations

import ctypes
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from inflight.errors import StartError
from inflight.startup import installed, require

if TYPE_CHECKING:
    import torch

    TorchDevice: TypeAlias = torch.device

CGROUP_STAT = "/sys/fs/cgroup/memory.stat"


class Device(ABC):
    """One device of one kind.

    Attributes:
        type: cpu, cuda or npu.
        index: number of the device of this type.
        collectives: the torch.distributed backend between ranks on such devices.
    """

    type: str
    collectives: str

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._threads = 0

    @cached_property
    def torch(self) -> TorchDevice:
        """The torch device; the first access imports torch.

        Raises:
            StartError: torch is not installed.
        """
        require("this model", "torch")
        import torch

        if self._threads:
            torch.set_num_threads(self._threads)
        return self._open()

    @abstractmethod
    def available_memory(self) -> int:
        """Bytes that are free now."""

    def set_threads(self, count: int) -> None:
        """CPU threads of torch's operators in this process."""
        self._threads = count
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(count)

    @abstractmethod
    def _open(self) -> TorchDevice: ...


class _Cpu(Device):
    type = "cpu"
    collectives = "gloo"

    def _open(self) -> TorchDevice:
        import torch

        return torch.device("cpu")

    def available_memory(self) -> int:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        for line in _lines("/proc/meminfo"):
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
        limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
        if limit and used and limit[0].isdigit():
            # Cached file pages, like those of the weights, count as used, and the kernel frees them on demand.
            files = [int(line.split()[1]) for line in _lines(CGROUP_STAT) if line.startswith("inactive_file ")]
            free = min(free, max(0, int(limit[0]) - int(used[0]) + sum(files)))
        return free


class _Cuda(Device):
    type = "cuda"
    collectives = "nccl"

    def _open(self) -> TorchDevice:
        import torch

        device = torch.device("cuda", self.index)
        torch.cuda.set_device(device)
        return device

    def available_memory(self) -> int:
        import torch

        device = self.torch
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(device)[0]
        return free


class _Npu(Device):
    """Ascend, through torch_npu."""

    type = "npu"
    collectives = "hccl"

    def _open(self) -> TorchDevice:
        import torch

        device = torch.device("npu", self.index)
        torch.npu.set_device(device)
        return device

    def available_memory(self) -> int:
        import torch

        device = self.torch
        torch.npu.empty_cache()
        free: int = torch.npu.mem_get_info(device)[0]
        return free


def open_device(device_type: str | None, device_id: int) -> Device:
    """Opens a device by type and number; None: the best type of this machine.

    Raises:
        StartError: there is no such device; the text names those that there are, or what to install.
    """
    if device_type not in (None, *_COUNTS):
        raise StartError(f"device type '{device_type}' is unknown; use cpu, cuda or npu")
    if device_type == "cpu":
        return _Cpu()
    if device_type is not None:
        require(f"device type '{device_type}'", "torch")
    counts = {kind: count() for kind, count in _COUNTS.items()}
    kind = device_type or next(kind for kind, count in counts.items() if count)
    if kind == "cpu":
        return _Cpu()
    if device_id >= counts[kind]:
        here = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise StartError(f"device {kind}:{device_id} is not there; this machine has {here}")
    return _Cuda(device_id) if kind == "cuda" else _Npu(device_id)


def _count_cuda() -> int:
    """The number of CUDA devices. torch takes a second to import, so that is done only where a driver is installed."""
    if not installed("torch") or not _has_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_driver() -> bool:
    """Whether a driver of NVIDIA or AMD is installed; torch calls the devices of both cuda."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _count_npu() -> int:
    if not installed("torch_npu"):
        return 0
    import torch
    import torch_npu  # noqa: F401 - registers torch.npu

    count: int = torch.npu.device_count()
    return count


_COUNTS: dict[str, Callable[[], int]] = {"cuda": _count_cuda, "npu": _count_npu, "cpu": lambda: 1}
"""Functions that count the devices of a type, the best type first."""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
