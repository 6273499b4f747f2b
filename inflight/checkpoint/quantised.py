"""Checkpoints of AutoAWQ, AutoGPTQ (GPTQModel) and compressed-tensors in Hugging Face layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inflight.checkpoint.files import Part, Tensor, Tensors, part_of
from inflight.checkpoint.schemes import FLOATS, Awq, CompressedTensors, Gptq, Scheme, StoredModule, text, whole
from inflight.checkpoint.source import Source, share_of
from inflight.errors import StartError
from inflight.tensors import Weight

log = logging.getLogger("inflight")

_ROWS = 1024  # that become floats at a time
_SUFFIX = ".weight"
_SAID = "the inputs of this GPTQ checkpoint are in an order of their own (desc_act), so it is computed in floats"


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How a config.json says that weights are stored; None: as floats.

    Raises:
        StartError: a method or a setting that is not known; the text says which and what to use instead.
    """
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else {}
    keys = ("quantization_config", "compression_config")  # the second one is compressed-tensors' former name
    found = next((each[key] for each in (config, inner) for key in keys if each.get(key)), None)
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise StartError("quantization_config in config.json is no object; download the checkpoint again")
    method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
    if method == "awq":
        return _awq(found)
    if method == "gptq":
        return _gptq(found)
    if method == "compressed-tensors":
        return _compressed(found)
    raise StartError(
        f"the checkpoint is quantised with '{method}' (quant_method in config.json), which is not read; use one of "
        "awq, gptq or compressed-tensors (integers), a GGUF file, or the model in bfloat16"
    )


def _awq(found: Mapping[str, Any]) -> Scheme:
    whole(found, "bits", (4,))
    version = text(found, "version", "gemm").lower()
    if version != "gemm":
        raise StartError(f"AWQ's packing '{version}' (version in quantization_config) is not read; use one of 'gemm'")
    return Awq(_group(found), bool(found.get("zero_point", True)))


def _gptq(found: Mapping[str, Any]) -> Scheme:
    bits = whole(found, "bits", (4, 8))
    form = text(found, "checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise StartError(f"GPTQ's checkpoint_format '{form}' is not read; use a checkpoint in 'gptq' or 'gptq_v2'")
    dynamic = found.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(rule).startswith("-:") for rule in dynamic):
        raise StartError("GPTQ with settings by module (dynamic in quantization_config) is not read; use one scheme")
    return Gptq(bits, _group(found), bool(found.get("sym", True)), form == "gptq_v2")


def _compressed(found: Mapping[str, Any]) -> Scheme:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise StartError("quantization_config of compressed-tensors has no config_groups; use a complete checkpoint")
    kinds = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise StartError(f"config_groups.{name} of compressed-tensors has no weights; use a complete checkpoint")
        form = group.get("format") or found.get("format") or "pack-quantized"
        if form not in ("pack-quantized", "int-quantized", "naive-quantized") or weights.get("type", "int") != "int":
            raise StartError(
                f"compressed-tensors' format '{form}' with weights of type '{weights.get('type', 'int')}' is not read; "
                "use pack-quantized or int-quantized with type int"
            )
        size = _group(weights) if weights.get("group_size") is not None else None
        kinds.append((whole(weights, "num_bits", (4, 8)), size))
    return CompressedTensors(tuple(kinds))


def _group(found: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale; None: all."""
    size = found.get("group_size", 128)
    if size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise StartError(f"group_size in quantization_config is {size!r}; it must be -1 or a whole number from 1")
    return size


class QuantisedFiles(Source):
    """Weight files some of whose weights may be stored as integers: which ones is told by the names in the files.

    Args:
        scheme: how; None: there are none.
    """

    def __init__(self, files: Tensors, scheme: Scheme | None) -> None:
        self._files = files
        self._scheme = scheme
        self.names = files.names
        self.size = files.size
        self._said = False

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._module(name) is not None

    def pieces(self, name: str) -> list[str]:
        module = self._module(name)
        return [name] if module is None else module.stored

    def idle(self, name: str) -> bool:
        """A bias of zeros: GPTQ's tools write one for every module."""
        module = self._module(name.removesuffix(".bias") + _SUFFIX) if name.endswith(".bias") else None
        return module is not None and not self._files.whole(name).any()

    def shape(self, name: str) -> list[int] | None:
        return None if self._module(name) is not None else self._files.shape(name)

    def check(self, name: str, wanted: Sequence[int]) -> None:
        module = self._module(name)
        if module is None or self._scheme is None:
            self._files.check(name, wanted)
        else:
            self._scheme.check(module, _matrix(name, wanted))

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> Weight:
        module = self._module(name)
        if module is None or self._scheme is None:
            return _floats(name, self._files.read(name, shape, part))
        found, order = self._scheme.read(module, _matrix(name, shape))
        if order is None:
            return share_of(found, part)
        if not self._said:
            self._said = True
            log.warning(_SAID)
        if part is not None and part[0] == 0:
            found, part = found.rows(part[1], part[2]), None
        spread = np.empty(found.shape, np.float32)
        for first in range(0, len(spread), _ROWS):
            spread[first : first + _ROWS, order] = found.rows(first, first + _ROWS).dequantise()
        return part_of(spread, part)

    def release(self) -> None:
        self._files.release()

    def _module(self, name: str) -> StoredModule | None:
        """What is stored for a weight, where that is integers."""
        if self._scheme is None or not name.endswith(_SUFFIX):
            return None
        stem = name.removesuffix(_SUFFIX)
        marks = self._scheme.marks
        if not any(all(f"{stem}.{suffix}" in self._files for suffix in mark) for mark in marks):
            return None
        return StoredModule(stem, self._scheme.suffixes, self._files)


def _floats(name: str, tensor: Tensor) -> Tensor:
    """Of a type that weights may have: double precision becomes single.

    Raises:
        StartError: they are no floats, and nothing says how to read them.
    """
    if tensor.dtype.name in FLOATS:
        return tensor
    if tensor.dtype == np.float64:
        return tensor.astype(np.float32)
    raise StartError(
        f"tensor '{name}' is stored as {tensor.dtype.name}, and the checkpoint says nothing of how to read it; use a "
        "checkpoint in bfloat16, float16 or float32, or one of AWQ or GPTQ"
    )


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise StartError(f"tensor '{name}' is quantised, the config wants shape {list(shape)}; are they of one model?")
    return shape[0], shape[1]
