"""LoRA adapters (Hu et al., 2021): what their files say, for the CPU engine and for torch's operators alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflight.checkpoint import open_adapter
from inflight.errors import StartError
from inflight.models.pieces import Product
from inflight.tensors import Floats

CONFIG = "adapter_config.json"
_REFUSED = {
    "modules_to_save": "it replaces whole layers of the model; merge it into the model",
    "use_dora": "its weights are normed anew (DoRA); merge it into the model",
    "trainable_token_indices": "it changes embeddings; merge it into the model",
    "lora_bias": "biases of its factors are not supported; merge it into the model",
    "layer_replication": "it repeats layers; merge it into the model",
    "alora_invocation_tokens": "it is applied from a place in the prompt on (activated LoRA)",
    "use_qalora": "its inputs are summed by groups (QA-LoRA); merge it into the model",
    "arrow_config": "it chooses among adapters for each token (Arrow)",
}
"""Fields of PEFT's config that change what an adapter computes, and why they are refused."""
_CHANGED = ("pissa", "olora", "corda", "loftq")
"""Initialisations with which PEFT also changes the model's own weights."""


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a module: scale * second (first x).

    Attributes:
        first: [rank, inputs].
        second: [outputs, rank].
    """

    first: Floats
    second: Floats
    scale: float


@dataclass(frozen=True)
class ModuleSlice:
    """This rank's part of a module of the checkpoint, in a fused product.

    Attributes:
        module: its name in the checkpoint.
        shape: of its whole weight.
        rows: [first, end) of its weight's rows.
        offset: column of the product where these rows begin.
        columns: [first, end) of its weight's columns; None: all.
        order: see `Piece`.
    """

    module: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    offset: int
    columns: tuple[int, int] | None = None
    order: tuple[int, ...] = ()


def module_slices(product: Product, offset: int = 0) -> list[ModuleSlice]:
    """The modules of the checkpoint in a product. Args: offset: column where its outputs begin."""
    slices = []
    for piece in product.weights:
        dim, first, end = piece.part or (0, 0, piece.shape[0])
        rows = (first, end) if dim == 0 else (0, piece.shape[0])
        columns = (first, end) if dim == 1 else None
        slices.append(ModuleSlice(piece.name.removesuffix(".weight"), piece.shape, rows, offset, columns, piece.order))
        offset += piece.size[0]
    return slices


class Adapter:
    """The files of one adapter.

    Raises:
        StartError: they are missing, broken, or of a kind that is not served; the text says which.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        try:
            files = open_adapter(folder)
            config = files.config
        except StartError as error:
            raise self.error(str(error)) from error
        self._check(config)
        self._turned = files.turned
        self._config: Mapping[str, Any] = config
        try:
            tensors = files.tensors()
        except StartError as error:
            raise self.error(f"its weights cannot be read: {error}") from error
        self._first: dict[str, Floats] = {}
        self._second: dict[str, Floats] = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight", key)
            if match is None:
                raise self.error(f"it holds '{key}', which is no LoRA factor of a linear layer")
            (self._first if match[2] == "A" else self._second)[match[1]] = tensor
        uneven = [module for module in self._first if module not in self._second]
        uneven += [module for module in self._second if module not in self._first]
        if uneven:
            raise self.error(f"'{uneven[0]}' has one factor only")
        self._left = dict.fromkeys(self._first)
        self._stored = {_path(module): module for module in self._first}

    def factors(self, part: ModuleSlice, head_dim: int) -> Factors | None:
        """What it adds to a rank's part of a module; None: nothing.

        Args:
            head_dim: values of an attention head.

        Raises:
            StartError: the factors do not fit the module.
        """
        module = self._stored.get(_path(part.module))
        if module is None:
            return None
        self._left.pop(module, None)
        first, second = self._first[module], self._second[module]
        if (first.ndim, second.ndim) != (2, 2) or (len(second), first.shape[1], second.shape[1]) != (
            *part.shape,
            len(first),
        ):
            raise self.error(
                f"its factors {list(first.shape)} and {list(second.shape)} do not fit '{module}', whose weight is "
                f"{list(part.shape)}; is it another model's?"
            )
        if not len(first):
            raise self.error(f"'{module}' has rank 0; is it whole?")
        if self._turned and module.endswith((".q_proj", ".k_proj")):
            second = second.reshape(-1, head_dim // 2, 2, len(first)).swapaxes(1, 2).reshape(second.shape)
        scale = self._scale(module, len(first))
        if part.columns is not None:
            first = first[:, slice(*part.columns)]
        second = second[slice(*part.rows)]
        return Factors(first, second[list(part.order)] if part.order else second, scale)

    def refuse(self, slices: Iterable[ModuleSlice], why: str) -> None:
        """Raises StartError if it changes one of these modules. Args: why: it cannot, beginning with `which` or so."""
        for part in slices:
            module = self._stored.get(_path(part.module))
            if module is not None:
                raise self.error(f"it changes '{module}', {why}")

    def finish(self) -> None:
        """Raises StartError if a module of the adapter was not used, because the model has none of that name."""
        if self._left:
            raise self.error(f"it changes '{next(iter(self._left))}', which this model has not, or not as one layer")

    def error(self, text: str) -> StartError:
        return StartError(f"adapter '{self.name}' in '{self._folder}': {text}")

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
            raise self.error(f"{CONFIG} is not that of a LoRA adapter (peft_type LORA)")
        for key in ("alpha_pattern", "rank_pattern"):
            if not isinstance(config.get(key) or {}, Mapping):
                raise self.error(f"{key} in {CONFIG} is {config[key]!r}; it must be an object")
        for pattern in config.get("alpha_pattern") or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.error(f"alpha_pattern in {CONFIG} has '{pattern}', which is no pattern: {error}") from error
        for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float, type(None))):
                raise self.error(f"{CONFIG} has the alpha {alpha!r}; it must be a number")
        for key, why in _REFUSED.items():
            if config.get(key):
                raise self.error(f"{key} is not supported: {why}")
        if config.get("bias", "none") != "none":
            raise self.error("biases of an adapter are not supported")
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_CHANGED):
            raise self.error(
                f"init_lora_weights '{begun}' also changes the model's own weights; save it as a plain adapter "
                "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
            )


def _path(module: str) -> str:
    """A module's path within the language part. Models that read images have different paths in front of it in
    checkpoints and in adapters, which are named by transformers' modules."""
    return re.sub(r"^(model\.(language_model|text_model)|language_model\.model|model)\.", "", module)
