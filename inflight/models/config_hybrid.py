"""Reads config.json of families whose layers have recurrent states of other kinds than Qwen's: LFM2, and Mamba 2 in
Granite 4, Falcon-H1 and Nemotron-H.

A GGUF file's config has `standard_names`: its tensors are named as Llama's and Qwen's checkpoints have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from inflight.kernels import Mamba
from inflight.models.config_base import base as base_config
from inflight.models.config_base import rope_settings
from inflight.models.description import EXPERT_NAMES, Config, DecoderConfig, Experts, Multipliers
from inflight.models.recurrences import ConvNet, StateSpace

_LEGACY = {"mamba": "linear_attention", "attention": "full_attention"}
"""Types of layers by their names in older files."""
_LFM2_EXPERTS = ("mlp.experts.{}.w1.weight", "mlp.experts.{}.w3.weight", "mlp.experts.{}.w2.weight")


def _layer_types(config: Config, types: Sequence[Any], known: tuple[str, ...]) -> list[str]:
    """The type of each layer, by its name of today."""
    found = [_LEGACY.get(kind, kind) for kind in types[: config["num_hidden_layers"]]]
    unknown = next((kind for kind in found if kind not in known), None)
    if unknown is not None:
        raise ValueError(f"'layer_types' has '{unknown}', known are {', '.join(known)}")
    if len(found) < config["num_hidden_layers"]:
        raise ValueError(f"'layer_types' has {len(found)} entries for {config['num_hidden_layers']} layers")
    if "full_attention" not in found and "hybrid" not in found:
        raise ValueError("no layer has attention, and such models are not read")
    return found


def _lfm2(config: Config) -> DecoderConfig:
    """LFM2 and LFM2.5, dense or with experts."""
    family = config["model_type"]
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    attention = config.get("full_attn_idxs")
    types = config.get("layer_types") or [
        "full_attention" if attention is None or layer in attention else "conv" for layer in range(layers)
    ]
    types = [
        "conv" if kind == "conv" else "full_attention"
        for kind in _layer_types(config, types, ("conv", "full_attention"))
    ]
    sparse = family == "lfm2_moe"
    sizes = {"intermediate_size": _lfm2_width(config, sparse), "rms_norm_eps": config.get("norm_eps", 1e-5)}
    base = base_config({"num_key_value_heads": 8, "max_position_embeddings": 128_000, **config, **sizes})
    rope = rope_settings(config, 1_000_000.0)
    conv = ConvNet(
        tuple(kind == "conv" for kind in types), hidden, config.get("conv_L_cache") or 3, bool(config.get("conv_bias"))
    )
    names = {
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "mlp": "feed_forward",
        "norm": "embedding_norm",
    }
    experts = _lfm2_experts(config, layers) if sparse else None
    return replace(
        base,
        tied=bool(config.get("tie_embedding", config.get("tie_word_embeddings", True))),
        qk_norm=True,
        ropes={"all": rope},
        recurrence=conv if any(conv.layers) else None,
        experts=experts,
        names={} if config.get("standard_names") else names,
    )


def _lfm2_width(config: Config, sparse: bool) -> int:
    """Columns of the MLP, which dense models state before they take two thirds of them."""
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if sparse or not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    multiplier, step = config.get("block_ffn_dim_multiplier", 1.0), config.get("block_multiple_of", 256)
    return width if multiplier is None else step * -(-int(multiplier * width) // step)


def _lfm2_experts(config: Config, layers: int) -> Experts:
    dense = config.get("num_dense_layers", 2)
    return Experts(
        count=config["num_experts"],
        chosen=config.get("num_experts_per_tok", 4),
        size=config["moe_intermediate_size"],
        normalise=bool(config.get("norm_topk_prob", True)),
        layers=tuple(layer >= dense for layer in range(layers)),
        router="mlp.gate.weight",
        names=EXPERT_NAMES if config.get("standard_names") else _LFM2_EXPERTS,
        sigmoid=True,
        bias="mlp.expert_bias" if config.get("use_expert_bias", True) else "",
        floor=1e-6,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )


def _mamba(config: Config, heads: int, head_dim: int, **settings: Any) -> Mamba:
    """The shape of a Mamba 2 layer, by the names that Granite's and Falcon's configs have."""
    least, most = _step_limit(config)
    shape = Mamba(
        heads,
        head_dim,
        config.get("mamba_n_groups") or 1,
        config.get("mamba_d_state") or 256,
        config.get("mamba_d_conv") or 4,
        **{"least": least, "most": most, **settings},
    )
    check_mamba(shape)
    return shape


def check_mamba(shape: Mamba) -> None:
    """Raises ValueError if a Mamba 2 layer's sizes make no sense."""
    sizes = shape.heads, shape.head_dim, shape.groups, shape.state
    if any(not isinstance(size, int) or size < 1 for size in sizes) or shape.heads % shape.groups:
        raise ValueError(f"Mamba layers of {shape.heads} heads of {shape.head_dim} in {shape.groups} groups")
    if not 2 <= shape.taps <= 8:
        raise ValueError(f"a convolution of {shape.taps} taps; 2 to 8 are supported")
    if not 0.0 <= shape.least <= shape.most:
        raise ValueError(f"'time_step_limit' goes from {shape.least} to {shape.most}")


def _step_limit(config: Config) -> tuple[float, float]:
    """Bounds of Mamba's steps. transformers writes infinity as an object."""
    least, most = (
        float(each["__float__"] if isinstance(each, Mapping) else each)
        for each in config.get("time_step_limit") or (0.0, math.inf)
    )
    return least, most


def _check_activation(name: str, value: Any) -> None:
    if value not in (None, "silu", "swish"):
        raise ValueError(f"'{name}' is '{value}'; Mamba layers have silu")


def _head_dim(config: Config, inner: int) -> int:
    """Columns of a Mamba head."""
    given = config.get("mamba_d_head", "auto")
    heads = config["mamba_n_heads"]
    size = inner // heads if given in (None, "auto") else int(given)
    if size * heads != inner:
        raise ValueError(f"{heads} Mamba heads of {size} columns do not make {inner}")
    return size


def _granite(config: Config) -> DecoderConfig:
    """Granite 4: attention or Mamba 2, then an MLP that all tokens take, in some models with experts beside it."""
    layers = config["num_hidden_layers"]
    default = ["linear_attention"] * layers
    types = _layer_types(config, config.get("layer_types") or default, ("linear_attention", "full_attention"))
    _check_activation("hidden_act", config.get("hidden_act"))
    width = config.get("shared_intermediate_size") or 1024
    base = base_config({**config, "intermediate_size": width})
    positions = config.get("position_embedding_type") == "rope"
    bias, standard = bool(config.get("attention_bias", False)), bool(config.get("standard_names"))
    names = {
        "mlp.gate_up_proj": "shared_mlp.input_linear",
        "mlp.down_proj": "shared_mlp.output_linear",
        "mlp.shared_expert.gate_up_proj": "shared_mlp.input_linear",
        "mlp.shared_expert.down_proj": "shared_mlp.output_linear",
        "mlp.gate": "block_sparse_moe.router.layer",
        "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
    }
    recurrent = tuple(kind == "linear_attention" for kind in types)
    inner = int(config.get("mamba_expand") or 2) * config["hidden_size"]
    count = config.get("num_local_experts", 8)
    return replace(
        base,
        scale=config.get("attention_multiplier", 1.0),
        embedding_scale=config.get("embedding_multiplier", 1.0),
        residual_scale=config.get("residual_multiplier", 1.0),
        logits_divider=config.get("logits_scaling", 1.0),
        qkv_bias=bias,
        out_bias=bias,
        longest=base.longest if positions else base.max_positions,
        ropes=base.ropes if positions else {},
        rope_of=(("all" if positions else None),) * layers,
        fused_mlp=not standard,
        recurrence=StateSpace(
            recurrent,
            _mamba(config, config["mamba_n_heads"], _head_dim(config, inner)),
            bool(config.get("mamba_conv_bias", True)),
            bool(config.get("mamba_proj_bias", False)),
            bool(config.get("mamba_proj_bias", False)),
        )
        if any(recurrent)
        else None,
        experts=Experts(
            count=count,
            chosen=config.get("num_experts_per_tok", 2),
            size=config["intermediate_size"],
            normalise=True,  # the softmax of the chosen ones alone
            layers=(True,) * layers,
            router="mlp.gate.weight",
            names=EXPERT_NAMES,
            shared=width,
            shared_gated=False,
        )
        if count
        else None,
        names={} if standard else names,
    )


def _falcon_h1(config: Config) -> DecoderConfig:
    """Falcon-H1: attention and Mamba 2 in every layer, side by side, with multipliers nearly everywhere."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    _check_activation("hidden_act", config.get("hidden_act"))
    base = base_config({"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 8192, **config})
    inner = config.get("mamba_d_ssm", 1024) or int(config.get("mamba_expand") or 2) * hidden
    gate, x, b, c, step = _several(config, "ssm_multipliers", 5)
    mlp_gate, mlp_down = _several(config, "mlp_multipliers", 2)
    reads, attends = _number(config, "ssm_in_multiplier"), _number(config, "attention_in_multiplier")
    bias = bool(config.get("attention_bias", False))
    # What a product reads is multiplied behind it, together with its bias, which would have to be left out.
    for biased, multiplier in (("attention_bias", "attention_in_multiplier"), ("mamba_proj_bias", "ssm_in_multiplier")):
        if config.get(biased) and _number(config, multiplier) != 1.0:
            raise ValueError(f"'{biased}' beside '{multiplier}' other than 1 is not read")
    names = {"post_attention_layernorm": "pre_ff_layernorm", "mlp": "feed_forward", "norm": "final_layernorm"}
    return replace(
        base,
        # Multipliers of what attention reads: queries, keys and values have them, and no norm is behind.
        scale=base.scale * attends * attends * _number(config, "key_multiplier"),
        embedding_scale=_number(config, "embedding_multiplier"),
        logits_divider=1.0 / _number(config, "lm_head_multiplier"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        multipliers=Multipliers(
            attention=attends * _number(config, "attention_out_multiplier"),
            recurrent=_number(config, "ssm_out_multiplier"),
            down=mlp_down,
            gate=mlp_gate,
        ),
        attention=(True,) * layers,
        recurrence=StateSpace(
            (True,) * layers,
            _mamba(
                config,
                config["mamba_n_heads"],
                _head_dim(config, inner),
                gate_scale=gate * reads,
                step_scale=step * reads,
                norm_first=bool(config.get("mamba_norm_before_gate", True)),
                normed=bool(config.get("mamba_rms_norm", False)),
            ),
            bool(config.get("mamba_conv_bias", True)),
            bool(config.get("mamba_proj_bias", False)),
            bool(config.get("projectors_bias", False)),
            (x * reads, b * reads, c * reads),
        ),
        names={} if config.get("standard_names") else names,
    )


def _number(config: Config, key: str) -> float:
    value = config.get(key)
    value = 1.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < 1e30:
        raise ValueError(f"'{key}' is {value!r}, where a number belongs")
    return float(value)


def _several(config: Config, key: str, count: int) -> list[float]:
    values = config.get(key) or [1.0] * count
    if len(values) != count:
        raise ValueError(f"'{key}' has {len(values)} numbers, not {count}")
    return [_number({key: value}, key) for value in values]


_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_NEMOTRON_NAMES = {
    "embed_tokens": "embeddings",
    "norm": "norm_f",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn": "mixer",
    "mlp": "mixer",
    "mlp.shared_expert": "mixer.shared_experts",
    "mamba": "mixer",
}


def _nemotron_h(config: Config) -> DecoderConfig:
    """Nemotron-H and Nemotron 3: each layer is one of Mamba 2, attention, an MLP, experts."""
    given = config.get("layers_block_type") or config.get("layer_types")
    if given is None:
        pattern = config["hybrid_override_pattern"]
        given = [_PATTERN.get(letter, letter) for letter in pattern]
    config = {**config, "num_hidden_layers": len(given)}
    types = _layer_types(config, given, ("linear_attention", "full_attention", "mlp", "moe"))
    if config.get("moe_latent_size"):
        raise ValueError("experts behind a latent projection ('moe_latent_size') are not read")
    _check_activation("mamba_hidden_act", config.get("mamba_hidden_act"))
    settings = {
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "hidden_act": config.get("mlp_hidden_act") or "relu2",
        "intermediate_size": 1,  # of models without an MLP
    }
    base = base_config({**settings, **config})
    attention = bool(config.get("attention_bias", False))

    def of(kind: str) -> tuple[bool, ...]:
        return tuple(each == kind for each in types)

    return replace(
        base,
        prefix="backbone.",
        activation=settings["hidden_act"],
        gated=False,
        qkv_bias=attention,
        out_bias=attention,
        mlp_bias=bool(config.get("mlp_bias", False)),
        longest=base.max_positions,
        ropes={},
        rope_of=(None,) * base.layers,
        attention=of("full_attention"),
        mlp=of("mlp"),
        recurrence=_nemotron_mamba(config, of("linear_attention")),
        experts=_nemotron_experts(config, of("moe")) if "moe" in types else None,
        # A GGUF file has the one norm of a layer under attention's name.
        names={"post_attention_layernorm": "input_layernorm"} if config.get("standard_names") else _NEMOTRON_NAMES,
    )


def _nemotron_mamba(config: Config, layers: tuple[bool, ...]) -> StateSpace | None:
    least, most = _step_limit(config)
    shape = Mamba(
        config["mamba_num_heads"],
        config["mamba_head_dim"],
        config.get("mamba_n_groups") or config.get("n_groups") or 8,
        config.get("ssm_state_size") or 128,
        config.get("mamba_d_conv") or config.get("conv_kernel") or 4,
        least=least,
        most=most,
    )
    check_mamba(shape)
    bias = bool(config.get("use_bias", False))
    return StateSpace(layers, shape, bool(config.get("use_conv_bias", True)), bias, bias) if any(layers) else None


def _nemotron_experts(config: Config, layers: tuple[bool, ...]) -> Experts:
    return Experts(
        count=config.get("n_routed_experts", 8),
        chosen=config.get("num_experts_per_tok", 2),
        size=config["moe_intermediate_size"],
        normalise=bool(config.get("norm_topk_prob", True)),
        layers=layers,
        router="mlp.gate.weight",
        names=EXPERT_NAMES,
        shared=config["moe_shared_expert_intermediate_size"],
        shared_gated=False,
        sigmoid=True,
        bias="mlp.expert_bias" if config.get("standard_names") else "mlp.gate.e_score_correction_bias",
        groups=config.get("n_group", 1),
        kept=config.get("topk_group", 1),
        floor=1e-20,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )


HYBRIDS: dict[str, Callable[[Config], DecoderConfig]] = {
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2,
    "granitemoehybrid": _granite,
    "falcon_h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
}
