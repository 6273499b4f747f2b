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
        self._vision = config["vision_config"].get("model_type")
        self._model = _empty(config).to(self._dtype).eval()
        _fill(self._model, weights)
        versions = f"torch {torch.__version__} transformers {transformers.__version__}"
        self.identity = f"{versions} {dtype} {threads} threads"

    def run(self, prepared: Prepared) -> TowerOutput:
        with torch.inference_mode():
            pixels = torch.from_numpy(prepared.pixels).to(self._dtype)
            outputs = [self._model.get_image_features(**inputs) for inputs in self._inputs(prepared, pixels)]
            rows = torch.cat([_flat(output.pooler_output) for output in outputs])
            rows = rows[: len(rows) // 2] if self._vision == "pixtral" else rows
            added = getattr(outputs[0], "deepstack_features", None) or ()
            return TowerOutput(rows.float().numpy(), tuple(_flat(each).float().numpy() for each in added))

    def _inputs(self, prepared: Prepared, pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """The inputs of each call: one for a tile, or for all where they are joined."""
        if self._kind in ("smolvlm", "idefics3"):
            return [{"pixel_values": tile[None, None]} for tile in pixels]
        if self._kind in ("llava_next", "llava_onevision"):
            return [{"pixel_values": pixels[None], "image_sizes": torch.tensor([prepared.size])}]
        if self._kind in ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"):
            patches, rows, columns = self._patches(pixels[0])
            return [{"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])}]
        if self._kind == "gemma4":
            patches, positions = self._places(pixels[0])
            return [{"pixel_values": patches, "image_position_ids": positions}]
        if self._vision == "pixtral":
            # transformers fails at a picture of one token, so there are always two pictures; the second is dropped.
            sizes = torch.tensor([pixels.shape[2:]] * 2)
            return [{"pixel_values": pixels.expand(2, -1, -1, -1), "image_sizes": sizes}]
        return [{"pixel_values": tile[None]} for tile in pixels]

    def _places(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gemma 4's patches [1, rows * columns, patch * patch * 3] with their columns and rows."""
        patch = self._model.config.vision_config.patch_size
        rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
        cut = pixels.view(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return cut, torch.stack([column, row], dim=-1).view(1, -1, 2)

    def _patches(self, pixels: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Qwen's patches [rows * columns, 3 * 2 * patch * patch]: those that are merged follow each other; the picture
        stands twice, as two frames."""
        vision = self._model.config.vision_config
        patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
        cut = pixels.view(3, rows // merge, merge, patch, columns // merge, merge, patch)
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1)
        return cut.reshape(rows * columns, -1), rows, columns


def _flat(features: Any) -> torch.Tensor:
    """[N, hidden] of a tensor, or of several."""
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _empty(config: Mapping[str, Any]) -> Any:
    """The model with a language model that has no layers and hardly a vocabulary, and with any weights."""
    given = transformers.AutoConfig.for_model(**dict(config))
    text = given.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 8, None
    if getattr(given, "audio_config", None) is not None:
        given.audio_config = None
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
    kept = model.state_dict(keep_vars=True)  # parameters, and buffers that a checkpoint has
    for name, parameter in kept.items():
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
