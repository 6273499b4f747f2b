"""LoRA adapters (Hu et al., 2021) in PEFT's layout, several in one batch.

Every product of the decoder that an adapter may change holds a `LowRank`. A step says which tokens belong to which
adapter, and only those get its update. Ranks split updates as they split the weights: the second factor by rows if the
weight is split by rows, the first by columns if it is split by columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inflight.checkpoint import LoraFolder
from inflight.errors import StartError
from inflight.nn import to_tensor

CONFIG = "adapter_config.json"


@dataclass
class AdapterTokens:
    """The tokens of each adapter in the running step: (the adapter's number, int64 [n] indices)."""

    current: list[tuple[int, torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class ModuleSlice:
    """This rank's part of a module of the checkpoint, in a fused product.

    Attributes:
        module: its name in the checkpoint.
        rows: [first, end) of its weight's rows.
        offset: column of the product where these rows begin.
        columns: [first, end) of its weight's columns; None: all.
    """

    module: str
    rows: tuple[int, int]
    offset: int
    columns: tuple[int, int] | None = None


class LowRank:
    """The updates of one product: those of every adapter to every module in it."""

    def __init__(self, adapter_tokens: AdapterTokens, slices: list[ModuleSlice]) -> None:
        self._adapter_tokens = adapter_tokens
        self._module_slices = slices
        self._factors: dict[int, list[tuple[torch.Tensor, torch.Tensor, int]]] = {}

    def load(self, number: int, adapter: Adapter, like: torch.Tensor) -> None:
        """Reads this rank's share of one adapter's factors."""
        for part in self._module_slices:
            factors = adapter.factors(part.module)
            if factors is None:
                continue
            first, second = factors
            if part.columns is not None:
                first = first[:, slice(*part.columns)]
            second = second[slice(*part.rows)]
            self._factors.setdefault(number, []).append((first.to(like), second.to(like), part.offset))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds every token's update. Args: x [T, in], y [T, out], changed in place."""
        for number, index in self._adapter_tokens.current:
            inputs = x[index]
            for first, second, at in self._factors.get(number, ()):
                end = at + second.shape[0]
                y[index, at:end] += (inputs @ first.T) @ second.T


class Adapter:
    """The files of one adapter.

    Raises:
        StartError: they are missing, broken, or of a kind that is not served; the text says which.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        model = LoraFolder(folder)
        try:
            config = model.config
        except StartError as error:
            raise self._error(str(error)) from error
        self._check(config)
        self._config: Mapping[str, Any] = config
        try:
            with model.weights() as weights:
                tensors = {name: to_tensor(weights.floats(name)) for name in weights.names}
        except StartError as error:
            raise self._error(f"its weights cannot be read: {error}") from error
        self._first: dict[str, torch.Tensor] = {}
        self._second: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight", key)
            if match is None:
                raise self._error(f"it holds '{key}', which is no LoRA factor of a linear layer")
            (self._first if match[2] == "A" else self._second)[match[1]] = tensor
        uneven = [module for module in self._first if module not in self._second]
        uneven += [module for module in self._second if module not in self._first]
        if uneven:
            raise self._error(f"'{uneven[0]}' has one factor only")
        self._left = dict.fromkeys(self._first)
        self._stored = {_path(module): module for module in self._first}

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A [r, in] and scale * B [out, r] of a module, None: the adapter does not change it."""
        stored = self._stored.get(_path(module))
        if stored is None:
            return None
        module, first = stored, self._first[stored]
        self._left.pop(module, None)
        second = self._second[module]
        return first, second * self._scale(module, first.shape[0])

    def finish(self) -> None:
        """Raises StartError if a module of the adapter was not used, because the model has none of that name."""
        if self._left:
            raise self._error(f"it changes '{next(iter(self._left))}', which this model has not, or not as one layer")

    def _scale(self, module: str, rank: int) -> float:
        alpha = float(self._pattern("alpha_pattern", module) or self._config.get("lora_alpha") or rank)
        return alpha / rank**0.5 if self._config.get("use_rslora") else alpha / rank

    def _pattern(self, key: str, module: str) -> Any:
        for pattern, value in (self._config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return None

    def _check(self, config: Any) -> None:
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise self._error(f"{CONFIG} is not that of a LoRA adapter (peft_type LORA)")
        for key in ("alpha_pattern", "rank_pattern"):
            if not isinstance(config.get(key) or {}, Mapping):
                raise self._error(f"{key} in {CONFIG} is {config[key]!r}; it must be an object")
        for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float, type(None))):
                raise self._error(f"{CONFIG} has the alpha {alpha!r}; it must be a number")
        for key in ("modules_to_save", "use_dora", "trainable_token_indices"):
            if config.get(key):
                raise self._error(f"{key} is not supported")
        if config.get("bias", "none") != "none":
            raise self._error("biases of an adapter are not supported")

    def _error(self, text: str) -> StartError:
        return StartError(f"adapter '{self.name}' in '{self._folder}': {text}")


def _path(module: str) -> str:
    """A module's path within the language part. Models that read images have different paths in front of it in
    checkpoints and in adapters, which are named by transformers' modules."""
    return re.sub(r"^(model\.(language_model|text_model)|language_model\.model|model)\.", "", module)
