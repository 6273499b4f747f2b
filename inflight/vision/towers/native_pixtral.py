"""Pixtral's encoder (Mistral AI, 2024), and Mistral 3's join: patches of any size with rotations on two axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.kernels import TowerArrays
from inflight.tensors import Floats
from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.native_layers import LayerForm, Layers, Sizes
from inflight.vision.towers.native_parts import (
    Indices,
    NativeSettings,
    NotNative,
    Parts,
    activation,
    blocks,
    field,
    number,
    patches,
)

DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "hidden_act": "gelu",
}
LAYER = LayerForm(
    norms=("attention_norm", "ffn_norm"),
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    rms=True,
    qkv_bias=False,
    bias=False,
)
EPS = 1e-5


class PixtralTower(Tower):
    """Mistral 3's tower, whose join puts squares of patches together, or LLaVA's with Pixtral, whose join does not.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.

    Raises:
        NotNative: features of several layers, or of a layer that is not the last.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        vision = {**DEFAULTS, **field(config, "vision_config")}
        if field(config, "vision_feature_layer", -1) != -1:
            raise NotNative("Pixtral's encoder with features of other layers than the last")
        heads, hidden = number(vision, "num_attention_heads"), number(vision, "hidden_size")
        sizes = Sizes(hidden, number(vision, "intermediate_size"), heads, EPS)
        if sizes.dim % 4:
            raise StartError(f"config.json: heads of {sizes.dim} values do not divide into two axes of pairs")
        self._patch, self._dim = number(vision, "patch_size"), sizes.dim
        self._theta = float((vision.get("rope_parameters") or {}).get("rope_theta", vision.get("rope_theta", 10000.0)))
        self._merge = 1 if config.get("model_type") == "llava" else int(field(config, "spatial_merge_size", 2))
        parts = Parts(weights, settings)
        program, prefix = parts.program, parts.prefix("patch_conv.weight")
        channels = int(field(vision, "num_channels", 3))
        cut, states = program.buffer(channels * self._patch**2), program.buffer(hidden)
        program.read(cut, 0)
        shape = [hidden, channels, self._patch, self._patch]
        program.multiply(cut, states, parts.product(f"{prefix}patch_conv", shape, bias=False, layer=False))
        program.norm(states, states, parts.norm(f"{prefix}ln_pre", hidden, EPS, bias=False))
        layers = Layers(parts, states, LAYER, sizes, activation(str(field(vision, "hidden_act"))))
        for index in range(number(vision, "num_hidden_layers")):
            layers.add(f"{prefix}transformer.layers.{index}.", angles=1)
        self._join(parts, config, states, hidden)
        self._program, self.identity = program, parts.identity

    def _join(self, parts: Parts, config: dict[str, Any], states: int, hidden: int) -> None:
        program = parts.program
        prefix = parts.prefix("multi_modal_projector.linear_1.weight") + "multi_modal_projector."
        out, bias = parts.outputs(f"{prefix}linear_1"), f"{prefix}linear_1.bias" in parts.weights
        merged, inner, rows = program.buffer(hidden, 1), program.buffer(out, 1), program.buffer(out, 1)
        if self._merge == 1:
            program.gather(states, merged, 0)
        else:
            normed, wide = program.buffer(hidden), program.buffer(hidden * self._merge**2, 1)
            eps = float(dict(field(config, "text_config")).get("rms_norm_eps", 1e-6))
            program.norm(states, normed, parts.norm(f"{prefix}norm", hidden, eps, bias=False))
            program.gather(normed, wide, 0)
            program.multiply(wide, merged, self._merging(parts, f"{prefix}patch_merger.merging_layer.weight", hidden))
        act = activation(str(field(config, "projector_hidden_act", "gelu")))
        first = parts.product(f"{prefix}linear_1", [out, hidden], bias=bias, layer=False)
        program.multiply(merged, inner, first, act=act)
        second = parts.product(f"{prefix}linear_2", [out, out], bias=bias, layer=False)
        program.multiply(inner, rows, second)
        program.output(rows)

    def _merging(self, parts: Parts, name: str, hidden: int) -> int:
        """The product of merged patches, whose inputs are stored channel by channel, and read patch by patch."""
        count = self._merge**2
        weight = parts.floats(name, [hidden, hidden * count]).reshape(hidden, hidden, count)
        return parts.pack(np.ascontiguousarray(weight.transpose(0, 2, 1)).reshape(hidden, -1), None)

    def run(self, prepared: Prepared) -> TowerOutput:
        [pixels] = prepared.pixels
        rows, columns = (side // self._patch for side in pixels.shape[1:])
        at, table = np.arange(rows * columns), blocks(rows, columns, self._merge)
        angles = _angles(at // columns, at % columns, self._dim, self._theta)
        arrays = [patches(pixels, self._patch), angles]
        run = TowerArrays([rows * columns, len(table)], arrays, [[rows * columns]], [table])
        return TowerOutput(self._program.run(run)[0])


def _angles(rows: Indices, columns: Indices, dim: int, theta: float) -> Floats:
    """As `axial_angles`, but of the frequencies of a whole head the rows have the even ones, the columns the others."""
    inverse = (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)
    turns = [
        rows.astype(np.float32)[:, None] * inverse[0::2],
        columns.astype(np.float32)[:, None] * inverse[1::2],
    ]
    angles = np.concatenate(turns, axis=1)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
