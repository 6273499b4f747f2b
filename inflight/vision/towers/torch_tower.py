"""A vision tower in transformers' modules, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.startup import switch_off
from inflight.vision.towers.base import Prepared, Tower, TowerOutput

LANGUAGE = ("language_model.", "text_model.", "lm_head.")
"""Modules of the language model, which stay empty."""


class TorchTower(Tower):
    """The tower and the join of a checkpoint, computed by transformers' `get_image_features`.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint, of which the tower's are read by their names.
        dtype: float32 or bfloat16.
        threads: that torch computes with, in the whole process.
    """

    def __init__(self, config: Mapping[str, Any], weights: Weights, dtype: str, threads: int) -> None:
        switch_off()
        torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        self._kind = str(config["model_type"])
        self._model = _empty(config).to(self._dtype).eval()
        _fill(self._model, weights)
        versions = f"torch {torch.__version__} transformers {transformers.__version__}"
        self._identity = f"{versions} {dtype} {threads} threads"

    @property
    def identity(self) -> str:
        return self._identity

    def run(self, prepared: Prepared) -> TowerOutput:
        with torch.inference_mode():
            pixels = torch.from_numpy(prepared.pixels).to(self._dtype)
            tiles = [self._features(pixels[None, tile : tile + 1]) for tile in range(len(pixels))]
            return TowerOutput(torch.cat(tiles).float().numpy())

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self._model.get_image_features(pixel_values=pixels).pooler_output))


def _empty(config: Mapping[str, Any]) -> Any:
    """The model with a language model that has no layers and hardly a vocabulary, and with any weights."""
    given = transformers.AutoConfig.for_model(**dict(config))
    text = given.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 8, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    given.quantization_config = None
    given._attn_implementation = "sdpa"
    with no_init_weights():
        model = transformers.AutoModelForImageTextToText.from_config(given)
    return model.model


def _fill(model: Any, weights: Weights) -> None:
    """
    Raises:
        StartError: a weight is missing, or of another shape.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(LANGUAGE):
            continue
        stored = _stored(name, weights)
        weights.check(stored, list(parameter.shape))
        parameter.data.copy_(torch.from_numpy(weights.floats(stored).astype("float32")))


def _stored(name: str, weights: Weights) -> str:
    """A parameter's name in the checkpoint: files have been written by several versions of transformers."""
    bare = name.replace("vision_tower.vision_model.", "vision_tower.")
    nested = bare.replace("vision_tower.", "vision_tower.vision_model.")
    for candidate in (name, bare, nested):
        for prefix in ("model.", ""):
            if prefix + candidate in weights:
                return prefix + candidate
    raise StartError(f"tensor 'model.{name}' of the vision tower is missing")
