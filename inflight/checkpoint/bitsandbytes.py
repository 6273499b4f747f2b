"""Checkpoints of bitsandbytes: nf4 and fp4 in blocks, int8 by rows.

Source: bitsandbytes/functional.py (QuantState, dequantize_4bit, int8_vectorwise_dequant).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight.checkpoint.schemes import Scheme, Stored, StoredModule
from inflight.checkpoint.unpack import unsigned
from inflight.tensors import Quantised

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class BitsAndBytes4(Scheme):
    """weight uint8 [n * k / 2, 1], the first value of a byte high; weight.quant_map float32 [16], the values of
    the codes; weight.absmax, a scale for each block of the values in their order, which may itself be coded in 8 bits
    (double quantisation: nested_absmax, nested_quant_map, and an offset in the state's JSON)."""

    suffixes = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES,
    )  # fmt: skip
    marks = (("weight", "weight.absmax", "weight.quant_map"),)

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        found, size = module.shape("weight"), -(-n * k // 2)
        if sorted(found) not in ([1, size], [size]) and found != [size, 1]:
            raise module.error("weight", f"has shape {found}, the config wants room for {[n, k]}")

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        self.check(module, shape)
        state = _state(module)
        if list(state.get("shape", shape)) != [n, k]:
            raise module.error("weight", f"says that its shape is {state['shape']}, the config wants {[n, k]}")
        octets = module.read("weight", module.shape("weight"), ("uint8",)).reshape(-1)
        block = _size(module, state, "blocksize", 64)
        absmax = self._absmax(module, state, -(-n * k // block))
        table = module.read("weight.quant_map", (16,), ("float32",))
        pairs = np.stack([table[np.arange(256) >> 4], table[np.arange(256) & 15]], axis=-1)
        values: NDArray[Any] = pairs[octets].reshape(-1)[: n * k]
        whole = n * k // block * block
        values[:whole].reshape(-1, block)[...] *= absmax[: whole // block, None]
        values[whole:] *= absmax[-1]
        return Stored(values.reshape(n, k))

    def _absmax(self, module: StoredModule, state: Mapping[str, Any], blocks: int) -> NDArray[Any]:
        found = module.read("weight.absmax", (blocks,), ("float32", "uint8"))
        if found.dtype == np.float32:
            return found
        block = _size(module, state, "nested_blocksize", 256)
        scales = module.read("weight.nested_absmax", (-(-blocks // block),), ("float32",))
        table = module.read("weight.nested_quant_map", (256,), ("float32",))
        offset = state.get("nested_offset", 0.0)
        if isinstance(offset, bool) or not isinstance(offset, (int, float)):
            raise module.error("weight.nested_absmax", f"has the offset {offset!r}")
        absmax: NDArray[Any] = table[found] * scales[np.arange(blocks) // block] + np.float32(offset)
        return absmax


@dataclass(frozen=True)
class BitsAndBytes8(Scheme):
    """weight int8 [n, k], SCB float32 [n], the largest magnitude of each row; w = weight * SCB / 127."""

    suffixes = ("weight", "SCB", "weight_format")
    marks = (("weight", "SCB"),)

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        module.files.check(f"{module.stem}.weight", shape)

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        codes = unsigned(module.read("weight", shape, ("int8",)))
        largest = module.read("SCB", (n,), ("float32", "float16", "bfloat16")).astype(np.float32)
        return Stored(Quantised(8, k, codes, (largest / np.float32(127)).reshape(n, 1)))


def _state(module: StoredModule) -> dict[str, Any]:
    """The JSON beside a weight, stored as the bytes of a tensor."""
    name = next((name for name in _STATES if module.has(name)), None)
    if name is None:
        return {}
    try:
        found = json.loads(module.read(name, module.shape(name), ("uint8",)).tobytes())
    except ValueError as error:
        raise module.error(name, f"holds no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("shape", []), list):
        raise module.error(name, "holds no JSON object with a shape")
    return found


def _size(module: StoredModule, state: Mapping[str, Any], key: str, default: int) -> int:
    size = state.get(key, default)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise module.error("weight", f"has the {key} {size!r}")
    return size
