"""The towers that have SigLIP's encoder and a join of their own: SmolVLM, Idefics3, Gemma 3."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.kernels import TowerArrays, TowerNorm
from inflight.tensors import Floats
from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.native_parts import Indices, NativeSettings, Parts, blocks, field
from inflight.vision.towers.native_vit import SIGLIP, Vit

IDEFICS3 = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
}
"""What a config of Idefics3 and SmolVLM may leave out."""
SIGLIP_DEFAULTS = {**IDEFICS3, "hidden_size": 768, "num_attention_heads": 12, "patch_size": 16}
"""What a config of any other SigLIP may leave out."""


class TileTower(Tower):
    """A tower that computes tiles one after the other, each of them alone."""

    def run(self, prepared: Prepared) -> TowerOutput:
        return TowerOutput(np.concatenate([self.tile(pixels) for pixels in prepared.pixels]))

    @abstractmethod
    def tile(self, pixels: Floats) -> Floats:
        """Rows [tokens, hidden] of one tile [3, height, width]."""


class Idefics3Tower(TileTower):
    """SmolVLM's and Idefics3's: a tile's patches are put together by pixel shuffle and go through one product.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        parts = Parts(weights, settings)
        self._encoder = encoder = Vit(parts, {**IDEFICS3, **field(config, "vision_config")}, SIGLIP)
        self._factor = int(field(config, "scale_factor", 2))
        program, width = parts.program, encoder.hidden * self._factor**2
        join = parts.prefix("modality_projection.proj.weight") + "modality_projection.proj"
        shape = [parts.outputs(join), width]
        normed, joined, rows = program.buffer(encoder.hidden), program.buffer(width, 1), program.buffer(shape[0], 1)
        last = parts.norm(f"{encoder.prefix}post_layernorm", encoder.hidden, encoder.sizes.eps)
        program.norm(encoder.states, normed, last)
        program.gather(normed, joined, 0)
        program.multiply(joined, rows, parts.product(join, shape, bias=False, layer=False))
        program.output(rows)
        self._program, self.identity = program, parts.identity

    def tile(self, pixels: Floats) -> Floats:
        encoder = self._encoder
        rows, columns = (side // encoder.patch for side in pixels.shape[1:])
        table = blocks(rows, columns, self._factor)
        arrays = encoder.arrays(pixels, bucketed(rows, columns, encoder.side))
        count = rows * columns
        return self._program.run(TowerArrays([count, len(table)], arrays, [[count]], [table]))[0]


class Gemma3Tower(TileTower):
    """Gemma 3's: means of squares of patches, a norm and one product.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        parts = Parts(weights, settings)
        self._encoder = encoder = Vit(parts, {**SIGLIP_DEFAULTS, **field(config, "vision_config")}, SIGLIP)
        side = int(int(field(config, "mm_tokens_per_image", 256)) ** 0.5)
        if encoder.side % side:
            raise StartError(f"config.json: {encoder.side} patches of a side do not divide into {side} tokens")
        self._table = blocks(encoder.side, encoder.side, encoder.side // side)
        program, hidden, eps = parts.program, encoder.hidden, encoder.sizes.eps
        prefix = parts.prefix("mm_input_projection_weight")
        projection = f"{prefix}mm_input_projection_weight"
        shape = [hidden, (weights.shape(projection) or [0, 0])[1]]
        normed, means, rows = program.buffer(hidden), program.buffer(hidden, 1), program.buffer(shape[1], 1)
        program.norm(encoder.states, normed, parts.norm(f"{encoder.prefix}post_layernorm", hidden, eps))
        program.average(normed, means, self._table.shape[1], 0)
        norm = program.weight(1 + parts.floats(f"{prefix}mm_soft_emb_norm.weight", [hidden]))
        product = parts.pack(np.ascontiguousarray(parts.floats(projection, shape).T), None)
        program.multiply(means, rows, product, norm=TowerNorm(norm, None, eps))
        program.output(rows)
        self._program, self.identity = program, parts.identity

    def tile(self, pixels: Floats) -> Floats:
        arrays, count = self._encoder.arrays(pixels), self._encoder.side**2
        return self._program.run(TowerArrays([count, len(self._table)], arrays, [[count]], [self._table]))[0]


def bucketed(rows: int, columns: int, side: int) -> Indices:
    """The learned position of each patch, for a grid of another size than the positions' (Dehghani et al., 2023).

    The arithmetic is float32, as in transformers: a fraction on a border falls on the same side.
    """
    borders = (np.arange(1, side, dtype=np.float64) * (1 / side)).astype(np.float32)

    def places(count: int) -> Indices:
        at = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        return np.asarray(np.searchsorted(borders, np.minimum(at, np.float32(1 - 1e-6)), side="right"), np.int64)

    return np.asarray(places(rows)[:, None] * side + places(columns)[None, :], np.int64).reshape(-1)
