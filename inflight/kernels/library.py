"""The native library, where it was built and is wanted."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, NamedTuple

import torch

native: Any
"""The extension module; None where it was built without a compiler."""
try:
    native = import_module("inflight.kernels._native")
except ImportError as error:
    native = None
    _missing = str(error)
else:
    _missing = ""

ISA = "INFLIGHT_CPU_ISA"
"""Environment variable that names one of `instruction_sets`, for tests."""
ENGINE = "INFLIGHT_CPU_ENGINE"
"""Environment variable: `torch` leaves the native engine out."""


def native_reason() -> str | None:
    """Why the native engine cannot run here; None where it can."""
    if os.environ.get(ENGINE, "").lower() == "torch":
        return f"{ENGINE} is torch"
    if native is None:
        return f"the package was built without a C++ compiler; install it again where there is one ({_missing})"
    return None


def instruction_sets() -> list[str]:
    """What this machine runs, the fastest first; empty without the native library."""
    return list(native.available()) if native is not None else []


class Top(NamedTuple):
    """values float32 [rows, k], largest first; indices int64 [rows, k], of equal values the lower first."""

    values: torch.Tensor
    indices: torch.Tensor


def top_k(logits: torch.Tensor, k: int) -> Top:
    """The k largest of each row, float32 [rows, n]; natively where the library is there and the rows are on the CPU."""
    rows, n = logits.shape
    if native is None or logits.device.type != "cpu" or logits.dtype != torch.float32 or logits.stride(-1) != 1:
        return Top(*torch.topk(logits, k, dim=-1))
    values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    native.top_k(logits.data_ptr(), rows, logits.stride(0), n, k, values.data_ptr(), indices.data_ptr())
    return Top(values, indices)
