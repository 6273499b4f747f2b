"""Encoders of one size of tile, with learned positions: SigLIP (Zhai et al., 2023), CLIP, InternViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.tensors import Floats
from inflight.vision.towers.native_layers import LayerForm, Layers, Sizes
from inflight.vision.towers.native_parts import Indices, Parts, activation, field, number, patches


@dataclass(frozen=True)
class VitForm:
    """What a family calls an encoder's weights, and what it has.

    Attributes:
        layer: of its layers, whose names begin with `layers` and a number.
        patch: the product of patches.
        positions: the learned ones, with one for the class token in front if there is such.
        class_token: None: there is none.
        patch_bias: whether the product of patches has one.
        pre_norm: in front of the layers.
    """

    layer: LayerForm
    layers: str = "encoder.layers."
    patch: str = "embeddings.patch_embedding"
    positions: str = "embeddings.position_embedding.weight"
    class_token: str | None = None
    patch_bias: bool = True
    pre_norm: str | None = None


SIGLIP_LAYER = LayerForm(
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    up=("mlp.fc1",),
    down="mlp.fc2",
)
SIGLIP = VitForm(SIGLIP_LAYER)
CLIP = VitForm(SIGLIP_LAYER, class_token="embeddings.class_embedding", patch_bias=False, pre_norm="pre_layrnorm")


class Vit:
    """Adds an encoder to a tower's program: patches and positions (arrays 0 and 1) become the states of a layer.

    Args:
        depth: layers to compute; None: all.

    Attributes:
        states: the buffer of the last computed layer's states, in front of any last norm.
        hidden: its width.
        patch: pixels of a patch's side.
        side: patches of a side of the picture that the positions are for.
        extra: rows in front of the patches': 1 with a class token.
    """

    def __init__(self, parts: Parts, config: dict[str, Any], form: VitForm, depth: int | None = None) -> None:
        program = parts.program
        self._parts, self._form = parts, form
        self.prefix = prefix = parts.prefix(f"{form.patch}.weight")
        self.sizes = sizes = Sizes(
            number(config, "hidden_size"),
            number(config, "intermediate_size"),
            number(config, "num_attention_heads"),
            float(field(config, "layer_norm_eps", 1e-6)),
        )
        self.patch, self.hidden = number(config, "patch_size"), sizes.hidden
        self.side = number(config, "image_size") // self.patch
        self.extra = 0 if form.class_token is None else 1
        channels = int(field(config, "num_channels", 3))
        cut, self.states = program.buffer(channels * self.patch**2), program.buffer(sizes.hidden)
        program.read(cut, 0)
        program.read(self.states, 1)
        shape = [sizes.hidden, channels, self.patch, self.patch]
        patching = parts.product(f"{prefix}{form.patch}", shape, bias=form.patch_bias, layer=False)
        program.multiply(cut, self.states, patching, add=True)
        self._positions = self._learned()
        if form.pre_norm is not None:
            norm = parts.norm(f"{prefix}{form.pre_norm}", sizes.hidden, sizes.eps)
            program.norm(self.states, self.states, norm)
        layers = Layers(parts, self.states, form.layer, sizes, activation(str(field(config, "hidden_act"))))
        for index in range(number(config, "num_hidden_layers") if depth is None else depth):
            layers.add(f"{prefix}{form.layers}{index}.")
        del self._parts  # and with it the checkpoint

    def _learned(self) -> Floats:
        """What is added to the patches; the class token is added to a patch of zeros."""
        parts, form, hidden = self._parts, self._form, self.hidden
        shape = parts.weights.shape(f"{self.prefix}{form.positions}") or []
        positions = parts.floats(f"{self.prefix}{form.positions}", shape).reshape(-1, hidden)
        parts.fits(len(positions) == self.side**2 + self.extra, f"{self.prefix}{form.positions}", shape)
        if form.class_token is None:
            return positions
        shape = parts.weights.shape(f"{self.prefix}{form.class_token}") or []
        positions[0] += parts.floats(f"{self.prefix}{form.class_token}", shape).reshape(hidden)
        if form.patch_bias:
            positions[0] -= parts.floats(f"{self.prefix}{form.patch}.bias", [hidden])
        return positions

    def arrays(self, pixels: Floats, places: Indices | None = None) -> list[Floats]:
        """The first two arrays of a run.

        Args:
            pixels: [3, height, width].
            places: of the patches among the learned positions; None: each has its own.
        """
        cut = patches(pixels, self.patch)
        if self.extra:
            cut = np.concatenate([np.zeros_like(cut[:1]), cut])
        return [cut, self._positions if places is None else self._positions[places]]
