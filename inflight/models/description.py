"""The description of a decoder that every family's config.json is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inflight.models.gemma4_shapes import Gemma4

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        count, chosen: experts, and how many of them a token takes.
        size: their intermediate size.
        normalise: the chosen experts' weights sum to 1.
        layers: which layers have them.
        router, names: checkpoint names below the layer: the router's, and gate, up, down with the expert's number.
        stacked: the experts of a layer lie in two tensors, `gate_up_proj` and `down_proj` (`located`).
        biased: the router and the experts have biases.
        stem: checkpoint name of the experts below the layer, where they are stacked.
        shared: intermediate size of an expert that every token takes too, times σ of a product; 0: there is none.
    """

    count: int
    chosen: int
    size: int
    normalise: bool
    layers: tuple[bool, ...]
    router: str
    names: tuple[str, str, str]
    shared: int = 0
    stacked: bool = False
    biased: bool = False
    stem: str = "mlp.experts"


@dataclass(frozen=True)
class DeltaNet:
    """Layers with a gated delta rule in place of attention (Qwen3-Next, Qwen3.5).

    Attributes:
        layers: which layers these are.
        key_heads, value_heads, key_dim, value_dim, taps, tiled: see `inflight.kernels.Delta`.
        joined: the products of queries, keys, values and z are one tensor, key head by key head, and those of β and the
            decays another (Qwen3-Next).
    """

    layers: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    tiled: bool = False
    joined: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer.

    Attributes:
        family: the model type.
        prefix: of the checkpoint's names.
        head_name, embedding_name: of the checkpoint's tensors; an empty one is `embed_tokens.weight` behind the prefix.
        qkv_bias, out_bias, mlp_bias: which linear layers have one.
        fused: qkv_proj and gate_up_proj in one tensor each.
        qk_norm: norms of queries and keys by head.
        centered_norm: weights of norms are stored as their distance from 1.
        sandwich: norms after attention and MLP too.
        windows: sliding window of each layer; None: full attention.
        max_positions: `max_position_embeddings`, from which rotations are computed.
        longest: tokens of the longest sequence, after the rotation's scaling.
        ropes: settings by name; `rope_of`: the one that each layer uses; None: no positions.
        embedding_scale, residual_scale, logits_divider: multipliers; 1.0 changes nothing.
        images: the model also reads images; this is its language part.
        axes: the axis of an image (0 time, 1 rows, 2 columns) along which each pair of components is rotated (mrope);
            empty: tokens have one position.
        deepstack: leading layers behind which an image's features are added to the hidden states.
        delta: layers with a recurrent state; None: all have attention.
        output_gate: what attention gives is multiplied by σ of as many further outputs of the queries' product, which
            stand behind each head's query.
        sinks: each head has a logit of a key without a value, which every query sees.
        gemma4: what only Gemma 4 has; None: another family.
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    activation: str
    max_positions: int
    longest: int
    tied: bool
    scale: float
    windows: tuple[int | None, ...]
    ropes: Mapping[str, Mapping[str, Any]]
    rope_of: tuple[str | None, ...]
    prefix: str = "model."
    head_name: str = "lm_head.weight"
    embedding_name: str = ""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    qk_norm: bool = False
    centered_norm: bool = False
    sandwich: bool = False
    softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divider: float = 1.0
    experts: Experts | None = None
    images: bool = False
    axes: tuple[int, ...] = ()
    deepstack: int = 0
    delta: DeltaNet | None = None
    output_gate: bool = False
    sinks: bool = False
    gemma4: Gemma4 | None = None

    def recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state in place of attention."""
        return self.delta is not None and self.delta.layers[layer]

    def rope_dim(self, name: str) -> int:
        """Components of the heads that a rotation turns."""
        if self.gemma4 is None or name not in self.rope_of:
            return self.head_dim
        return self.gemma4.shapes[self.rope_of.index(name)].dim
