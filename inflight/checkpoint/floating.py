"""Weights of floats with 8 or 4 bits and scales: fp8 as DeepSeek, Mistral, FBGEMM, modelopt and compressed-tensors
write it, NVFP4 and MXFP4 as compressed-tensors and modelopt do.

Floats of 8 bits become float32. Floats of 4 bits become integers of 8 bits, exactly: twice their values are 0, 1, 2, 3,
4, 6, 8, 12 and their negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight.checkpoint.files import Tensor
from inflight.checkpoint.schemes import FLOATS, Scheme, Stored, StoredModule
from inflight.tensors import Quantised

EIGHTS = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (*FLOATS, "float8_e4m3fn", "float8_e8m0fnu", "uint8")
_ROWS = 1024  # rows that are converted to floats at a time

_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12])
_CODES = np.concatenate([128 + _DOUBLED, 128 - _DOUBLED]).astype(np.uint8)
_PAIRS = np.stack([_CODES[np.arange(256) & 15], _CODES[np.arange(256) >> 4]], axis=-1)
"""Codes around 128 of a byte's two E2M1 floats: of the low half, then of the high one."""


@dataclass(frozen=True)
class Float8(Scheme):
    """weight float8 [n, k] and weight_scale_inv or weight_scale: one for all, for each row, for each group of a row's
    inputs or for each block of rows and inputs; w = weight * scale, whatever the name says.

    Attributes:
        block: rows and inputs of a block, if the config has them.
    """

    block: tuple[int, int] | None = None
    suffixes = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "input_scale_ub")
    marks = (("weight", "weight_scale_inv"), ("weight", "weight_scale"))

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        module.files.check(f"{module.stem}.weight", shape)

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        stored = module.read("weight", shape, EIGHTS)
        suffix = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
        scales = scales_of(module, suffix)
        rows, columns = self._steps(module, suffix, scales.shape, n, k)
        scales = scales.reshape(-(-n // rows), -(-k // columns))
        return Stored(scaled(stored, scales, rows, columns))

    def _steps(self, module: StoredModule, suffix: str, shape: Sequence[int], n: int, k: int) -> tuple[int, int]:
        """Rows and inputs that share a scale."""
        if len(shape) < 2 and shape in ((), (1,), (n,)):
            return (1 if shape == (n,) and n > 1 else n), k
        if len(shape) == 2 and self.block is not None:
            rows, columns = self.block
            if tuple(shape) == (-(-n // rows), -(-k // columns)):
                return rows, columns
        if len(shape) == 2 and shape[0] in (1, n) and 0 < shape[1] <= k and k % shape[1] == 0:
            return (1 if shape[0] == n else n), k // shape[1]
        wanted = f", or one for each block of {self.block}" if self.block is not None else ""
        raise module.error(
            suffix, f"has shape {list(shape)}, where one scale for {[n, k]}, for each row or group{wanted} belongs"
        )


@dataclass(frozen=True)
class Float4(Scheme):
    """Two E2M1 floats in a byte, the first one low: weight_packed or weight uint8 [n, k / 2], weight_scale [n, groups]
    of a float8 (NVFP4) or of E8M0 exponents (MXFP4), and for NVFP4 one more for the whole weight: weight_global_scale
    divides (compressed-tensors), weight_scale_2 multiplies (modelopt).

    Source: compressors/nvfp4 and compressors/mxfp4 of vllm-project/compressed-tensors; OCP Microscaling Formats 1.0.
    """

    group: int
    suffixes = (
        "weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_scale_2", "input_global_scale",
        "input_scale",
    )  # fmt: skip
    marks = (("weight_packed", "weight_scale"), ("weight", "weight_scale"))

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        module.files.check(f"{module.stem}.{self._name(module)}", (n, -(-k // 2)))

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        octets = module.read(self._name(module), (n, -(-k // 2)), ("uint8",))
        groups = -(-k // self.group)
        if module.shape("weight_scale") != [n, groups]:
            raise module.error("weight_scale", f"has shape {module.shape('weight_scale')}, where {[n, groups]} belongs")
        scales = scales_of(module, "weight_scale") * np.float32(0.5)
        if module.has("weight_global_scale"):
            scales = scales / _one(module, "weight_global_scale")
        elif module.has("weight_scale_2"):
            scales = scales * _one(module, "weight_scale_2")
        codes = _PAIRS[octets].reshape(n, -1)[:, :k]
        return Stored(Quantised(8, self.group, np.ascontiguousarray(codes), np.ascontiguousarray(scales)))

    def _name(self, module: StoredModule) -> str:
        return "weight_packed" if module.has("weight_packed") else "weight"


def scales_of(module: StoredModule, suffix: str) -> NDArray[np.float32]:
    """Scales as float32; bytes are E8M0 exponents: 2 ** (byte - 127)."""
    scales = module.read(suffix, module.shape(suffix), _SCALES)
    if scales.dtype == np.uint8:
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    return np.asarray(scales, np.float32)


def scaled(stored: Tensor, scales: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """stored * scales, float32 [n, k]; some rows at a time.

    Args:
        stored: float8 [n, k].
        scales: [ceil(n / rows), ceil(k / columns)].
    """
    n, k = stored.shape
    table: NDArray[Any] = np.arange(256, dtype=np.uint8).view(stored.dtype).astype(np.float32)
    octets = stored.view(np.uint8)
    values = np.empty((n, k), np.float32)
    for first in range(0, n, _ROWS):
        part = values[first : first + _ROWS]
        np.take(table, octets[first : first + _ROWS], out=part)
        each = scales[np.arange(first, first + len(part)) // rows]
        part *= each if columns >= k else np.repeat(each, columns, axis=1)[:, :k]
    return values


def _one(module: StoredModule, suffix: str) -> np.float32:
    """The one scale of a weight."""
    scales = scales_of(module, suffix).reshape(-1)
    if len(scales) != 1 or not np.isfinite(scales[0]) or scales[0] <= 0:
        raise module.error(suffix, "is no single number above 0")
    one: np.float32 = scales[0]
    return one
