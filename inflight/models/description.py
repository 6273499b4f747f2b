"""The description of a decoder that every family's config.json is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inflight.kernels import ACTIVATIONS, Growth
from inflight.models.gemma4_shapes import Gemma4
from inflight.models.recurrences import Recurrence

Config = Mapping[str, Any]


EXPERT_NAMES = (
    "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.down_proj.weight",
)
"""Where most checkpoints have the experts below a layer (`Experts.names`)."""


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
        shared: intermediate size of an expert that every token takes too; 0: there is none.
        shared_gated: what it gives is multiplied by σ of a product.
        sigmoid, groups, kept, floor, scale, single: see `inflight.kernels.Routing`.
        bias: checkpoint name below the layer of what is added to the scores for the choice; empty: nothing is.
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
    shared_gated: bool = True
    sigmoid: bool = False
    bias: str = ""
    groups: int = 1
    kept: int = 1
    floor: float = 0.0
    scale: float = 1.0
    single: bool = False

    @property
    def plain(self) -> bool:
        """Whether torch's operators have such a mixture."""
        return not (self.shared or self.sigmoid or self.bias or self.kept < self.groups) and self.scale == 1.0


@dataclass(frozen=True)
class Multipliers:
    """What is multiplied beside `residual_scale`; 1.0 changes nothing.

    Attributes:
        attention, recurrent, down: what attention, the recurrent layer and the MLP add.
        gate: the gate of the MLP, in front of its activation.
    """

    attention: float = 1.0
    recurrent: float = 1.0
    down: float = 1.0
    gate: float = 1.0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI, 2024, "DeepSeek-V2"): of a token the cache has a latent, of which every
    head's key and value are made, and one rotated key that all heads share.

    Attributes:
        rank: components of the latent.
        rotary: of the shared key, and of the last, rotated part of each head's query.
        plain: of the other part of each head's query.
        value: of each head's value.
        query_rank: components of a latent that queries are made of; 0: they are made of the hidden state.
        eps: of the latents' norms.
        apart: what makes keys and values of the latent lies head by head in the checkpoint, that of keys transposed
            (`located`); else in one tensor.
    """

    rank: int
    rotary: int
    plain: int
    value: int
    query_rank: int
    eps: float = 1e-6
    apart: bool = False

    @property
    def head(self) -> int:
        """Components of a head's query."""
        return self.plain + self.rotary


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer.

    Attributes:
        family: the model type.
        prefix: of the checkpoint's names.
        head_name, embedding_name: of the checkpoint's tensors; an empty one is `embed_tokens.weight` behind the prefix.
        qkv_bias, out_bias, mlp_bias: which linear layers have one.
        fused: qkv_proj and gate_up_proj in one tensor each.
        fused_mlp: gate_up_proj in one tensor, also of a shared expert.
        gated: MLP and experts have a gate.
        qk_norm: norms of queries and keys by head.
        wide_norm: these norms span all heads.
        norm_rotated: these norms come behind the rotation.
        centered_norm: weights of norms are stored as their distance from 1.
        sandwich: norms after attention and MLP too.
        norm_first: norms in front of attention and MLP.
        layer_norm: norms take the mean off first.
        parallel: attention and MLP read one norm, the one in front of attention.
        growth: of queries with their positions.
        interleaved: neighbours are rotated together in the checkpoint; rows of queries and keys are brought into the
            order of halves when they are read.
        windows: sliding window of each layer; None: full attention.
        max_positions: `max_position_embeddings`, from which rotations are computed.
        longest: tokens of the longest sequence, after the rotation's scaling.
        ropes: settings by name; `rope_of`: the one that each layer uses; None: no positions.
        embedding_scale, residual_scale, logits_divider: multipliers; 1.0 changes nothing.
        images: the model also reads images; this is its language part.
        axes: the axis of an image (0 time, 1 rows, 2 columns) along which each pair of components is rotated (mrope);
            empty: tokens have one position.
        deepstack: leading layers behind which an image's features are added to the hidden states.
        recurrence: layers with a recurrent state; None: there are none.
        attention: layers with attention; empty: those without a recurrent state.
        mlp: layers with an MLP; empty: those without experts.
        names: the checkpoint's own names of modules (`own_name`).
        multipliers: of the parts of a layer.
        output_gate: what attention gives is multiplied by σ of as many further outputs of the queries' product, which
            stand behind each head's query.
        sinks: each head has a logit of a key without a value, which every query sees.
        gemma4: what only Gemma 4 has; None: another family.
        latent: attention's, where the cache holds latents; None: it holds keys and values.
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
    wide_norm: bool = False
    norm_rotated: bool = False
    centered_norm: bool = False
    sandwich: bool = False
    norm_first: bool = True
    layer_norm: bool = False
    parallel: bool = False
    growth: Growth | None = None
    interleaved: bool = False
    softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divider: float = 1.0
    experts: Experts | None = None
    images: bool = False
    axes: tuple[int, ...] = ()
    deepstack: int = 0
    recurrence: Recurrence | None = None
    output_gate: bool = False
    sinks: bool = False
    gemma4: Gemma4 | None = None
    latent: Latent | None = None
    fused_mlp: bool = False
    gated: bool = True
    attention: tuple[bool, ...] = ()
    mlp: tuple[bool, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    multipliers: Multipliers = Multipliers()

    def recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state."""
        return self.recurrence is not None and self.recurrence.layers[layer]

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.attention[layer] if self.attention else not self.recurrent(layer)

    def mixes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.layers[layer]

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has an MLP."""
        return self.mlp[layer] if self.mlp else not self.mixes(layer)

    @property
    def on_torch(self) -> bool:
        """Whether torch's operators have all parts of the model."""
        plain = self.experts is None or self.experts.plain
        known = self.activation in ACTIVATIONS or self.xielu
        return self.recurrence is None and self.latent is None and known and plain and self.multipliers == Multipliers()

    @property
    def xielu(self) -> bool:
        """Whether the MLP's activation has factors of its own (Apertus)."""
        return self.activation == "xielu" and not self.gated

    def own_name(self, name: str) -> str:
        """The checkpoint's name of a tensor, by the name that it has in Llama's and Qwen's checkpoints.

        `names` has modules below a layer or below the prefix, with or without their children.
        """
        rest = name.removeprefix(self.prefix)
        lead = name[: len(name) - len(rest)]
        if rest.startswith("layers."):
            _, number, rest = rest.split(".", 2)
            lead = f"{lead}layers.{number}."
        parts = rest.split(".")
        for count in range(len(parts), 0, -1):
            found = self.names.get(".".join(parts[:count]))
            if found is not None:
                return lead + ".".join([found, *parts[count:]])
        return name

    def rope_dim(self, name: str) -> int:
        """Components of the heads that a rotation turns."""
        if self.latent is not None:
            return self.latent.rotary
        if self.gemma4 is None or name not in self.rope_of:
            return self.head_dim
        return self.gemma4.shapes[self.rope_of.index(name)].dim
