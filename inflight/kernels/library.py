"""The native library, if it was built, and its enumerations."""

from __future__ import annotations

from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Format",
    "KvType",
    "Mode",
    "OpCode",
    "Source",
    "TowerCode",
    "checksum",
    "instruction_sets",
    "native",
    "native_file",
    "native_reason",
    "top_k",
]

native: Any
"""The extension module; None if the package was built without a compiler."""
try:
    native = import_module("inflight.kernels._native")
except ImportError as error:
    native = None
    _missing = str(error)
else:
    _missing = ""

if TYPE_CHECKING:
    from inflight.kernels._native import Activation, Format, KvType, Mode, OpCode, Source, TowerCode
else:  # without the library no code that needs them can run
    Activation, Format, KvType, Mode, OpCode, Source, TowerCode = (
        getattr(native, name, None)
        for name in ("Activation", "Format", "KvType", "Mode", "OpCode", "Source", "TowerCode")
    )

ACTIVATIONS = {
    "silu": "SILU",
    "swish": "SILU",
    "gelu": "GELU",
    "gelu_new": "GELU_TANH",
    "gelu_pytorch_tanh": "GELU_TANH",
    "gelu_fast": "GELU_TANH",
    "relu": "RELU",
    "swiglu_clamped": "SWIGLU_CLAMPED",
    "relu2": "RELU_SQUARED",
}
"""Names in `Activation` by their names in a config."""


def native_file() -> Path | None:
    """The file of the native library; None if it was not built."""
    return None if native is None else Path(native.__file__)


def native_reason() -> str | None:
    """The reason why the native engine cannot run here; None if it can."""
    if native is None:
        return f"the package was built without a C++ compiler; install it again where there is one ({_missing})"
    return None


def instruction_sets() -> list[str]:
    """The instruction sets that this machine supports, fastest first; empty without the native library."""
    return list(native.available()) if native is not None else []


def checksum(data: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """64 bits that tell whether the bytes of a file are those that were written: they find damage, not forgery."""
    if native is None:
        return int.from_bytes(blake2b(data.data, digest_size=8).digest(), "little")
    assert data.flags.c_contiguous
    return int(native.checksum(data.ctypes.data, data.nbytes))


class Top(NamedTuple):
    """values float32 [rows, k], largest first; indices int64 [rows, k], of equal values the lower first."""

    values: np.ndarray[Any, np.dtype[np.float32]]
    indices: np.ndarray[Any, np.dtype[np.int64]]


def top_k(logits: np.ndarray[Any, np.dtype[np.float32]], k: int) -> Top | None:
    """The k largest logits of each row of float32 [rows, n], rows contiguous; None without the native library."""
    if native is None:
        return None
    assert logits.dtype == np.float32
    assert logits.strides[1] == 4
    rows, n = logits.shape
    values, indices = np.empty((rows, k), np.float32), np.empty((rows, k), np.int64)
    native.top_k(logits.ctypes.data, rows, logits.strides[0] // 4, n, k, values.ctypes.data, indices.ctypes.data)
    return Top(values, indices)
