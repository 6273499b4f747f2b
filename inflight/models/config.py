"""Reads every family's config.json into one description of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from inflight.checkpoint import rope_length, rope_type
from inflight.errors import StartError
from inflight.models.config_checks import check_config
from inflight.models.config_vision import VISION_FAMILIES, text_part

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

    def recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state in place of attention."""
        return self.delta is not None and self.delta.layers[layer]


def decoder_config(config: Config) -> DecoderConfig | None:
    """The description of a decoder; None: the family is not known.

    Raises:
        StartError: a setting is missing or invalid; the text names it.
    """
    family = config.get("model_type")
    read = _FAMILIES.get(family) if isinstance(family, str) else None
    if read is None:
        return None
    nested = config.get("text_config")
    for each in (config, nested if isinstance(nested, Mapping) else {}):
        check_config(each)
    try:
        return read(config)
    except KeyError as missing:
        raise StartError(f"config.json of type '{family}' has no {missing}") from None
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise StartError(f"config.json of type '{family}' makes no sense: {error}; download it again") from error


def _base(config: Config) -> DecoderConfig:
    """The settings that all families share, by Llama's names."""
    layers = config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope, max_positions = _rope(config, 10_000.0), config.get("max_position_embeddings", 2048)
    return DecoderConfig(
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_dim,
        intermediate=config["intermediate_size"],
        eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act") or "silu",
        max_positions=max_positions,
        longest=rope_length(rope, max_positions),
        tied=config.get("tie_word_embeddings", False),
        scale=head_dim**-0.5,
        windows=(None,) * layers,
        ropes={"all": rope},
        rope_of=("all",) * layers,
    )


def _rope(config: Config, theta: float) -> dict[str, Any]:
    """Settings of the rotation, in the form of transformers 5 (`rope_parameters`) or 4 (`rope_theta`,
    `rope_scaling`, which takes precedence)."""
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = config.get("rope_theta") or theta
    if config.get("partial_rotary_factor") is not None:
        settings.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") is not None:
        settings.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return settings


def _types(config: Config, pattern: Callable[[int], bool]) -> list[bool]:
    """The layers with a sliding window: `layer_types`, else the family's pattern."""
    types = config.get("layer_types")
    count = config["num_hidden_layers"]
    return [types[i] == "sliding_attention" for i in range(count)] if types else [pattern(i) for i in range(count)]


def _windows(config: Config, sliding: list[bool]) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    return tuple(window if slides else None for slides in sliding)


def _llama(config: Config) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return replace(_base(config), qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Config) -> DecoderConfig:
    return replace(_base(config), windows=_windows(config, [True] * config["num_hidden_layers"]))


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    if not config.get("use_sliding_window"):
        return (None,) * int(config["num_hidden_layers"])
    full = config.get("max_window_layers", config["num_hidden_layers"])
    return _windows(config, _types(config, lambda layer: layer >= full))


def _qwen2(config: Config) -> DecoderConfig:
    return replace(_base(config), qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: Config) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    head_dim = config.get("head_dim") or 128
    return replace(
        _base(config),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(config),
    )


def _qwen3_moe(config: Config) -> DecoderConfig:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    count = config.get("num_experts") or config["num_local_experts"]
    experts = Experts(
        count=count,
        chosen=config["num_experts_per_tok"],
        size=config["moe_intermediate_size"],
        normalise=config.get("norm_topk_prob", False),
        layers=tuple(
            layer not in dense and count > 0 and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"])
        ),
        router="mlp.gate.weight",
        names=(
            "mlp.experts.{}.gate_proj.weight",
            "mlp.experts.{}.up_proj.weight",
            "mlp.experts.{}.down_proj.weight",
        ),
    )
    base = _base(config)
    bias = bool(config.get("attention_bias", False))
    return replace(base, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=_qwen_windows(config), experts=experts)


def _qwen3_next(config: Config) -> DecoderConfig:
    """Qwen3-Next and the text parts of Qwen3.5 and 3.6, dense or with experts."""
    layers, family = int(config["num_hidden_layers"]), config["model_type"]
    interval = config.get("full_attention_interval") or 4
    types = config.get("layer_types") or [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)
    ]
    unknown = next((kind for kind in types if kind not in ("linear_attention", "full_attention")), None)
    if unknown is not None:
        raise ValueError(f"'layer_types' has '{unknown}', known are linear_attention and full_attention")
    rope, _ = plain_rope({"partial_rotary_factor": 0.25, **config})
    delta = DeltaNet(
        tuple(kind == "linear_attention" for kind in types[:layers]),
        config.get("linear_num_key_heads", 16),
        config.get("linear_num_value_heads", 32),
        config.get("linear_key_head_dim", 128),
        config.get("linear_value_head_dim", 128),
        config.get("linear_conv_kernel_dim", 4),
        bool(config.get("value_heads_tiled", False)),  # of a GGUF file
        joined=family == "qwen3_next",
    )
    if delta.value_heads % delta.key_heads or not 2 <= delta.taps <= 8:
        raise ValueError(f"{delta.value_heads} value heads, {delta.key_heads} key heads, {delta.taps} taps")
    sparse = family in ("qwen3_next", "qwen3_5_moe_text")
    described = _qwen3_moe(config) if sparse else _qwen3({**config, "head_dim": config.get("head_dim") or 256})
    if sparse:
        experts = described.experts
        assert experts is not None
        shared = int(config.get("shared_expert_intermediate_size") or 0)
        described = replace(described, experts=replace(experts, normalise=True, shared=shared))
    return replace(
        described,
        longest=described.max_positions,
        centered_norm=True,
        output_gate=True,
        delta=delta,
        ropes={"all": rope},
        windows=(None,) * layers,
    )


def plain_rope(config: Config) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The rotation of a text, and the sections of one that turns by axes: in a text all axes have the same position."""
    rope = _rope(config, 10_000_000.0)
    sections = tuple(rope.pop("mrope_section", None) or ())
    rope.pop("mrope_interleaved", None)
    for key in ("rope_type", "type"):
        if rope.get(key) == "mrope":
            rope[key] = "default"
    return rope, sections


def _qwen3_5(config: Config) -> DecoderConfig:
    """The language part of a Qwen3.5, whose files also hold an encoder of images."""
    text = dict(config["text_config"])
    text["model_type"] = f"{config['model_type']}_text"
    described = _qwen3_next(text)
    tied = bool(config.get("tie_word_embeddings") or described.tied)
    return replace(described, family=config["model_type"], prefix="model.language_model.", tied=tied)


def _mixtral(config: Config) -> DecoderConfig:
    experts = Experts(
        count=config["num_local_experts"],
        chosen=config["num_experts_per_tok"],
        size=config["intermediate_size"],
        normalise=True,
        layers=(True,) * config["num_hidden_layers"],
        router="block_sparse_moe.gate.weight",
        names=(
            "block_sparse_moe.experts.{}.w1.weight",
            "block_sparse_moe.experts.{}.w3.weight",
            "block_sparse_moe.experts.{}.w2.weight",
        ),
    )
    ropes = {"all": _rope(config, 1_000_000.0)}
    return replace(_mistral(config), experts=experts, ropes=ropes)


def _gemma(config: Config) -> DecoderConfig:
    """The settings that Gemma 2 and 3 share."""
    bias = bool(config.get("attention_bias", False))
    return replace(
        _base(config),
        activation=config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh",
        tied=config.get("tie_word_embeddings", True),
        scale=config["query_pre_attn_scalar"] ** -0.5,
        qkv_bias=bias,
        out_bias=bias,
        centered_norm=True,
        sandwich=True,
        softcap=config.get("attn_logit_softcapping"),
        final_softcap=config.get("final_logit_softcapping"),
        embedding_scale=config["hidden_size"] ** 0.5,
    )


def _gemma2(config: Config) -> DecoderConfig:
    return replace(_gemma(config), windows=_windows(config, _types(config, lambda layer: layer % 2 == 0)))


def _gemma3(config: Config) -> DecoderConfig:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    sliding = _types(config, lambda layer: (layer + 1) % pattern != 0)
    given = config.get("rope_parameters") or {}
    if "full_attention" in given or "sliding_attention" in given:
        ropes = {
            "full": {**(given.get("full_attention") or {}), **(config.get("rope_scaling") or {})},
            "sliding": dict(given.get("sliding_attention") or {}),
        }
    else:
        ropes = {"full": _rope(config, 1_000_000.0), "sliding": {}}
    for name, key, theta in (("full", "rope_theta", 1_000_000.0), ("sliding", "rope_local_base_freq", 10_000.0)):
        ropes[name].setdefault("rope_theta", config.get(key) or theta)
    return replace(
        _gemma(config),
        qk_norm=True,
        windows=_windows(config, sliding),
        longest=config.get("max_position_embeddings", 2048),  # includes the scaling
        ropes=ropes,
        rope_of=tuple("sliding" if slides else "full" for slides in sliding),
    )


def _vision(config: Config) -> DecoderConfig:
    """The language part of a model that also reads images."""
    family, text = VISION_FAMILIES[config["model_type"]], text_part(config)
    described = _FAMILIES[text.settings["model_type"]](text.settings)
    return replace(
        described,
        family=config["model_type"],
        prefix=family.prefix,
        tied=bool(config.get("tie_word_embeddings") or described.tied),
        images=True,
        axes=text.axes,
        deepstack=min(text.deepstack, described.layers),
    )


def _phi3(config: Config) -> DecoderConfig:
    """The settings of Phi 3. longrope was called su and yarn before; the original length has a key of its own."""
    rope = _rope(config, 10_000.0)
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", 4096)
    if rope_type(rope) in ("longrope", "yarn"):
        rope["rope_type"] = "longrope"
    base = _mistral({**config, "max_position_embeddings": config.get("max_position_embeddings") or 4096})
    return replace(base, fused=True, ropes={"all": rope}, longest=rope_length(rope, base.max_positions))


def _granite(config: Config) -> DecoderConfig:
    return replace(
        _llama(config),
        scale=config.get("attention_multiplier", 1.0),
        embedding_scale=config.get("embedding_multiplier", 1.0),
        residual_scale=config.get("residual_multiplier", 1.0),
        logits_divider=config.get("logits_scaling", 1.0),
    )


def _smollm3(config: Config) -> DecoderConfig:
    layers = config["num_hidden_layers"]
    rotated = config.get("no_rope_layers") or [
        int((layer + 1) % config.get("no_rope_layer_interval", 4) != 0) for layer in range(layers)
    ]
    return replace(
        _llama(config),
        tied=config.get("tie_word_embeddings", True),
        windows=_qwen_windows(config),
        ropes={"all": _rope(config, 2_000_000.0)},
        rope_of=tuple("all" if rope else None for rope in rotated),
    )


_FAMILIES: dict[str, Callable[[Config], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_text": _qwen3_next,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_5_moe_text": _qwen3_next,
    "smollm3": _smollm3,
}
_FAMILIES.update(dict.fromkeys(VISION_FAMILIES, _vision))

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The families whose config.json is read, by `model_type`."""
