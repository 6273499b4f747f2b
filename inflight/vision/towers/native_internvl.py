"""InternVL's tower: an encoder with layer scale, pixel shuffle, and an MLP."""

from __future__ import annotations

from typing import Any

from inflight.checkpoint import Weights
from inflight.kernels import TowerArrays
from inflight.tensors import Floats
from inflight.vision.towers.native_layers import LayerForm
from inflight.vision.towers.native_parts import NativeSettings, NotNative, Parts, activation, blocks, field
from inflight.vision.towers.native_siglip import TileTower
from inflight.vision.towers.native_vit import Vit, VitForm

DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "image_size": 448,
    "patch_size": 14,
}
JOIN_EPS = 1e-5


class InternVLTower(TileTower):
    """InternViT without its own norms of queries and keys, which only the largest models have.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.

    Raises:
        NotNative: a kind of encoder that is computed with torch.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        vision = {**DEFAULTS, **field(config, "vision_config")}
        layer = field(config, "vision_feature_layer", -1)
        if vision.get("use_qk_norm") or not vision.get("use_absolute_position_embeddings", True) or layer != -1:
            raise NotNative("this kind of InternVL's encoder")
        parts = Parts(weights, settings)
        form = VitForm(
            LayerForm(
                norms=("layernorm_before", "layernorm_after"),
                qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                out="attention.projection_layer",
                up=("mlp.fc1",),
                down="mlp.fc2",
                rms=vision.get("norm_type", "layer_norm") == "rms_norm",
                qkv_bias=bool(vision.get("attention_bias", False)),
                scales=("lambda_1", "lambda_2"),
            ),
            layers="encoder.layer.",
            patch="embeddings.patch_embeddings.projection",
            positions="embeddings.position_embeddings",
            class_token="embeddings.cls_token",
        )
        self._encoder = encoder = Vit(parts, vision, form)
        factor = round(1 / float(field(config, "downsample_ratio", 0.5)))
        self._table = 1 + blocks(encoder.side, encoder.side, factor)  # the class token is row 0
        program, hidden, width = parts.program, encoder.hidden, encoder.hidden * factor**2
        states = encoder.states
        if not vision.get("use_mean_pooling", True):
            states = program.buffer(hidden)
            program.norm(encoder.states, states, parts.norm(f"{encoder.prefix}layernorm", hidden, encoder.sizes.eps))
        prefix = parts.prefix("multi_modal_projector.linear_1.weight") + "multi_modal_projector."
        out = parts.outputs(f"{prefix}linear_1")
        joined, inner, rows = program.buffer(width, 1), program.buffer(out, 1), program.buffer(out, 1)
        program.gather(states, joined, 0)
        first = parts.product(f"{prefix}linear_1", [out, width], layer=False)
        act = activation(str(field(config, "projector_hidden_act", "gelu")))
        program.multiply(joined, inner, first, norm=parts.norm(f"{prefix}layer_norm", width, JOIN_EPS), act=act)
        program.multiply(inner, rows, parts.product(f"{prefix}linear_2", [out, out], layer=False))
        program.output(rows)
        self._program, self.identity = program, parts.identity

    def tile(self, pixels: Floats) -> Floats:
        arrays = self._encoder.arrays(pixels)
        count = len(arrays[0])
        return self._program.run(TowerArrays([count, len(self._table)], arrays, [[count]], [self._table]))[0]
