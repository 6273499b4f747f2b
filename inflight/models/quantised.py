"""Checkpoints of AutoAWQ, AutoGPTQ (GPTQModel) and compressed-tensors in Hugging Face layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from inflight.errors import StartError
from inflight.models.files import Part, TensorFiles
from inflight.models.schemes import Awq, CompressedTensors, Gptq, Scheme, StoredModule, text, whole
from inflight.nn import to_tensor
from inflight.tensors import Quantised

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


class QuantisedFiles:
    """Weight files some of whose weights may be stored as integers: which ones is told by the names in the files.

    Args:
        scheme: how; None: there are none.
    """

    def __init__(self, files: TensorFiles, scheme: Scheme | None) -> None:
        self._files = files
        self._scheme = scheme
        self.size = files.size
        self._said = False

    @property
    def names(self) -> list[str]:
        return self._files.names

    def close(self) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._module(name) is not None

    def pieces(self, name: str) -> list[str]:
        module = self._module(name)
        return [name] if module is None else module.stored

    def idle(self, name: str) -> bool:
        """A bias of zeros: GPTQ's tools write one for every module."""
        module = self._module(name.removesuffix(".bias") + _SUFFIX) if name.endswith(".bias") else None
        return module is not None and not self._files.read(name, self._files.shape(name)).any()

    def check(self, name: str, wanted: Sequence[int]) -> None:
        module = self._module(name)
        if module is None or self._scheme is None:
            self._files.check(name, wanted)
        else:
            self._scheme.check(module, _matrix(name, wanted))

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        module = self._module(name)
        if module is None or self._scheme is None:
            return self._files.read(name, shape, part)
        found, order = self._scheme.read(module, _matrix(name, shape))
        if order is None:
            return floats(found, part)
        spread = torch.empty(found.shape)
        spread[:, order] = floats(found, None)
        return spread if part is None else spread.narrow(part[0], part[1], part[2] - part[1])

    def integers(self, name: str, shape: Sequence[int]) -> Quantised | None:
        module = self._module(name)
        if module is None or self._scheme is None:
            return None
        found, order = self._scheme.read(module, _matrix(name, shape))
        if order is None:
            return found
        if not self._said:
            self._said = True
            log.warning(_SAID)
        return None

    def _module(self, name: str) -> StoredModule | None:
        """What is stored for a weight, where that is integers."""
        if self._scheme is None or not name.endswith(_SUFFIX):
            return None
        stem = name.removesuffix(_SUFFIX)
        marks = self._scheme.marks
        if not any(all(f"{stem}.{suffix}" in self._files for suffix in mark) for mark in marks):
            return None
        return StoredModule(stem, self._scheme.suffixes, self._files)


def floats(found: Quantised, part: Part | None) -> torch.Tensor:
    """What integers stand for, float32, or a part of it; some rows at a time, so that little more than the result is
    in memory."""
    if part is not None and part[0] == 0:
        found, part = found.rows(part[1], part[2]), None
    n, k = found.shape
    first, end = (0, k) if part is None else (part[1], part[2])
    result = torch.empty(n, end - first)
    for row in range(0, n, _ROWS):
        last = min(row + _ROWS, n)
        result[row:last] = to_tensor(found.rows(row, last).dequantise())[:, first:end]
    return result


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise StartError(f"tensor '{name}' is quantised, the config wants shape {list(shape)}; are they of one model?")
    return shape[0], shape[1]
