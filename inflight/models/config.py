"""Reads every family's config.json into one description of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from inflight.checkpoint import rope_length, rope_type
from inflight.errors import StartError
from inflight.kernels import Delta
from inflight.models.config_base import base as _base
from inflight.models.config_base import rope_settings as _rope
from inflight.models.config_base import sliding_layers as _types
from inflight.models.config_base import windows_of as _windows
from inflight.models.config_checks import check_config, check_described
from inflight.models.config_gemma import gemma2, gemma3, gemma4
from inflight.models.config_hybrid import HYBRIDS
from inflight.models.config_latent import LATENT
from inflight.models.config_more import MORE
from inflight.models.config_vision import VISION_FAMILIES, interleaved_axes, text_part
from inflight.models.description import EXPERT_NAMES, Config, DecoderConfig, Experts
from inflight.models.recurrences import DeltaNet

__all__ = ["FAMILIES", "Config", "DecoderConfig", "Experts", "decoder_config", "plain_rope"]


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
        described = read(config)
        check_described(described)
    except KeyError as missing:
        raise StartError(f"config.json of type '{family}' has no {missing}") from None
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise StartError(f"config.json of type '{family}' makes no sense: {error}; download it again") from error
    return described


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
        names=EXPERT_NAMES,
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
    delta = Delta(
        config.get("linear_num_key_heads", 16),
        config.get("linear_num_value_heads", 32),
        config.get("linear_key_head_dim", 128),
        config.get("linear_value_head_dim", 128),
        config.get("linear_conv_kernel_dim", 4),
        bool(config.get("value_heads_tiled", False)),  # of a GGUF file
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
        recurrence=DeltaNet(
            tuple(kind == "linear_attention" for kind in types[:layers]),
            delta,
            joined=family == "qwen3_next" and not config.get("apart_projections"),  # of a GGUF file
            joined_rates=family == "qwen3_next",
        ),
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
    """The language part of a Qwen3.5, whose files also hold an encoder of images. Only what attention rotates of a head
    has axes."""
    text = dict(config["text_config"])
    text["model_type"] = f"{config['model_type']}_text"
    described = _qwen3_next(text)
    rope, sections = plain_rope({"partial_rotary_factor": 0.25, **text})
    turned = int(described.head_dim * rope["partial_rotary_factor"])
    return replace(
        described,
        family=config["model_type"],
        prefix="model.language_model.",
        tied=bool(config.get("tie_word_embeddings") or described.tied),
        images=True,
        axes=interleaved_axes(sections or (11, 11, 10), turned // 2),
    )


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


def _gpt_oss(config: Config) -> DecoderConfig:
    alpha, limit = config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)
    if (alpha, limit) != (1.702, 7.0):
        raise ValueError(f"swiglu_alpha {alpha} and swiglu_limit {limit}, where 1.702 and 7.0 are known")
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    given = config.get("rope_parameters") or config.get("rope_scaling")
    longest = config.get("max_position_embeddings") or 131_072
    base = _base({"head_dim": 64, "rms_norm_eps": 1e-5, **config, "max_position_embeddings": longest})
    bias = bool(config.get("attention_bias", True))
    sliding = _types(config, lambda layer: layer % 2 == 0)
    return replace(
        base,
        activation="swiglu_clamped",
        longest=longest,  # includes the scaling
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        windows=_windows({"sliding_window": 128, **config}, sliding),
        ropes={"all": _rope({**config, "rope_parameters": given or yarn}, 150_000.0)},
        experts=Experts(
            count=config["num_local_experts"],
            chosen=config.get("num_experts_per_tok") or 4,
            size=config["intermediate_size"],
            normalise=True,  # the softmax of the chosen ones alone
            layers=(True,) * base.layers,
            router="mlp.router.weight",
            names=EXPERT_NAMES,
            biased=True,
        ),
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
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gemma4": gemma4,
    "gemma4_text": gemma4,
    "phi3": _phi3,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_text": _qwen3_next,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_5_moe_text": _qwen3_next,
    "smollm3": _smollm3,
}
_FAMILIES.update(HYBRIDS)
_FAMILIES.update(MORE)
_FAMILIES.update(LATENT)
_FAMILIES.update(dict.fromkeys(VISION_FAMILIES, _vision))

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The families whose config.json is read, by `model_type`."""
