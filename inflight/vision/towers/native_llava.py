"""The towers of LLaVA 1.5, NeXT and OneVision: CLIP's or SigLIP's encoder, an MLP, and rows of tiles with line ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.kernels import TowerArrays
from inflight.tensors import Floats
from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.native_parts import NativeSettings, NotNative, Parts, activation, field
from inflight.vision.towers.native_pixtral import PixtralTower
from inflight.vision.towers.native_siglip import SIGLIP_DEFAULTS, TileTower
from inflight.vision.towers.native_vit import CLIP, SIGLIP, Vit

ENCODERS = {
    "clip_vision_model": (
        CLIP,
        {**SIGLIP_DEFAULTS, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    ),
    "siglip_vision_model": (SIGLIP, SIGLIP_DEFAULTS),
}
"""Encoders, and what their configs may leave out, by their `model_type`."""


class LlavaTower(TileTower):
    """LLaVA 1.5's: the patches of one layer go through an MLP.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.

    Raises:
        NotNative: another encoder, or features of several layers.
    """

    encoder = "clip_vision_model"
    strategy = "default"
    layer = -2

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        vision = dict(field(config, "vision_config"))
        layer = field(config, "vision_feature_layer", self.layer)
        kind = str(vision.get("model_type", self.encoder))
        if kind not in ENCODERS or not isinstance(layer, int):
            raise NotNative("an encoder of this kind")
        form, defaults = ENCODERS[kind]
        vision = {**defaults, **vision}
        parts = Parts(weights, settings)
        depth = layer if layer >= 0 else int(vision["num_hidden_layers"]) + 1 + layer
        self._encoder = encoder = Vit(parts, vision, form, depth)
        cut = 1 if field(config, "vision_feature_select_strategy", self.strategy) == "default" else 0
        self._table = np.arange(cut, encoder.side**2 + encoder.extra)[:, None]
        program, hidden = parts.program, encoder.hidden
        prefix = parts.prefix("multi_modal_projector.linear_1.weight") + "multi_modal_projector."
        out, bias = parts.outputs(f"{prefix}linear_1"), f"{prefix}linear_1.bias" in weights
        chosen, inner, rows = program.buffer(hidden, 1), program.buffer(out, 1), program.buffer(out, 1)
        program.gather(encoder.states, chosen, 0)
        act = activation(str(field(config, "projector_hidden_act", "gelu")))
        first = parts.product(f"{prefix}linear_1", [out, hidden], bias=bias, layer=False)
        program.multiply(chosen, inner, first, act=act)
        second = parts.product(f"{prefix}linear_2", [out, out], bias=bias, layer=False)
        program.multiply(inner, rows, second)
        program.output(rows)
        self._program, self.identity = program, parts.identity
        self._join(config, parts, out)

    def _join(self, config: dict[str, Any], parts: Parts, hidden: int) -> None:
        """Reads what joins the tiles."""

    def tile(self, pixels: Floats) -> Floats:
        arrays = self._encoder.arrays(pixels)
        count = len(arrays[0])
        return self._program.run(TowerArrays([count, len(self._table)], arrays, [[count]], [self._table]))[0]


class LlavaNextTower(LlavaTower):
    """LLaVA-NeXT's: behind the picture as a whole its tiles, without their padding, and an end of each line."""

    sizes: Sequence[tuple[int, int]] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def _join(self, config: dict[str, Any], parts: Parts, hidden: int) -> None:
        name = parts.prefix("image_newline") + "image_newline"
        self._newline = parts.floats(name, [hidden])
        self._sizes = [(int(height), int(width)) for height, width in config.get("image_grid_pinpoints") or self.sizes]
        self._pixels = self._encoder.side * self._encoder.patch

    def run(self, prepared: Prepared) -> TowerOutput:
        whole, *tiles = (self.tile(pixels) for pixels in prepared.pixels)
        if not tiles:
            return TowerOutput(np.concatenate([whole, self._newline[None]]))
        side = self._encoder.side
        height, width = best_size(prepared.size, self._sizes)
        rows, columns = height // self._pixels, width // self._pixels
        grid = np.stack(tiles).reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
        grid = self._fewer(unpadded(grid.reshape(rows * side, columns * side, -1), prepared.size))
        ends = np.broadcast_to(self._newline, (len(grid), 1, len(self._newline)))
        lines = np.concatenate([grid, ends], axis=1).reshape(-1, len(self._newline))
        return TowerOutput(np.concatenate([whole, lines]))

    def _fewer(self, grid: Floats) -> Floats:
        """A grid of at most the family's number of rows."""
        return grid


class LlavaOnevisionTower(LlavaNextTower):
    """LLaVA-OneVision's: large grids are scaled down."""

    encoder = "siglip_vision_model"
    strategy = "full"
    layer = -1
    sizes = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

    def _join(self, config: dict[str, Any], parts: Parts, hidden: int) -> None:
        super()._join(config, parts, hidden)
        self._most = int(str(field(config, "vision_aspect_ratio", "anyres_max_9")).rpartition("_")[2])

    def _fewer(self, grid: Floats) -> Floats:
        height, width, _ = grid.shape
        ratio = math.sqrt(height * width / (self._most * self._encoder.side**2))
        return grid if ratio <= 1.1 else scaled(grid, int(height // ratio), int(width // ratio))


def llava_tower(config: dict[str, Any], weights: Weights, settings: NativeSettings) -> Tower:
    """LLaVA with the encoder that its config names."""
    pixtral = dict(field(config, "vision_config")).get("model_type") == "pixtral"
    return (PixtralTower if pixtral else LlavaTower)(config, weights, settings)


def best_size(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of a picture's pixels, and of those the one with the least padding."""

    def kept(height: int, width: int) -> tuple[int, int]:
        scale = min(width / size[1], height / size[0])
        pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return pixels, pixels - height * width

    return max(sizes, key=lambda each: kept(*each))


def unpadded(grid: Floats, size: tuple[int, int]) -> Floats:
    """Cuts the padding from a grid [rows, columns, hidden] of a picture of (height, width)."""
    rows, columns = grid.shape[:2]
    if size[1] / size[0] > columns / rows:
        padding = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    return grid[:, padding : columns - padding]


def scaled(grid: Floats, rows: int, columns: int) -> Floats:
    """Bilinear between the centres of a grid's cells, as torch's interpolation."""
    for axis, count in ((0, rows), (1, columns)):
        size = grid.shape[axis]
        at = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(size / count) - np.float32(0.5)
        at = np.maximum(at, 0)
        low = at.astype(np.int64)
        share = (at - low).reshape(-1, *([1] * (2 - axis)))
        high = np.minimum(low + 1, size - 1)
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return np.asarray(grid, np.float32)
