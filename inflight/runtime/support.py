"""Shared by several runtimes: the hardware of this machine, checks of the request, and a batch for warming up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inflight.contract import DTYPE_CODES, Array, GraphSpec
from inflight.errors import StartError
from inflight.runtime.base import LoadRequest

# Devices are recognised by their nodes: a probe that loaded the driver would hold memory on the device for as long as
# the process lives. /dev/dxg is the GPU of WSL, /dev/nvhost-gpu that of Jetson boards.
_NVIDIA_NODES = ("nvidia[0-9]*", "dxg", "nvhost-gpu")
_AMD_NODES = ("kfd",)
_ASCEND_NODES = ("davinci[0-9]*",)


def _has_node(patterns: tuple[str, ...]) -> bool:
    return any(next(Path("/dev").glob(pattern), None) is not None for pattern in patterns)


def has_nvidia() -> bool:
    return _has_node(_NVIDIA_NODES)


def has_amd() -> bool:
    return _has_node(_AMD_NODES)


def has_ascend() -> bool:
    return _has_node(_ASCEND_NODES)


def present_devices() -> tuple[str, ...]:
    """Device types of this machine's hardware, in this order: `ascend`, `gpu`, `cpu`."""
    types = (("ascend", has_ascend()), ("gpu", has_nvidia() or has_amd()), ("cpu", True))
    return tuple(name for name, here in types if here)


def require_files(request: LoadRequest) -> tuple[Path, ...]:
    """The files of the request.

    Raises:
        StartError: there is none, or one of them is not a readable file.
    """
    if not request.files:
        raise StartError("Load model failed, no model file is given: name at least one in declare_model")
    for file in request.files:
        if not file.is_file():
            raise StartError(f"Load model failed, there is no model file '{file}'")
    return request.files


def refuse_config_file(request: LoadRequest, name: str) -> None:
    """Raises StartError when a `config_file` is given to a runtime that reads none: silence would hide a mistake."""
    if request.config_file is not None:
        raise StartError(
            f"Load model failed, {name} models take no config_file, but '{request.config_file}' is given: "
            "remove it from declare_model and give options in the device info of the context"
        )


def is_static(graph: GraphSpec) -> bool:
    """Whether every dimension of every input is known."""
    return all(spec.shape is not None and -1 not in spec.shape for spec in graph.inputs)


def zero_batch(graph: GraphSpec) -> list[Array] | None:
    """Zeros for every input, one row where the batch dimension is open.

    None where a dtype or a dimension other than the first is unknown: any guess could be wrong.
    """
    batch: list[Array] = []
    for spec in graph.inputs:
        if spec.dtype not in DTYPE_CODES or spec.shape is None or -1 in spec.shape[1:]:
            return None
        batch.append(np.zeros([1 if size == -1 else size for size in spec.shape], spec.dtype))
    return batch
