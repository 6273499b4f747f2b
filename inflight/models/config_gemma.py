"""Reads the config.json of Gemma 2, 3 and 4."""

from __future__ import annotations

from dataclasses import replace

from inflight.models.config_base import base, rope_settings, sliding_layers, windows_of
from inflight.models.description import Config, DecoderConfig, Experts
from inflight.models.gemma4_shapes import FULL, SLIDING, gemma4_of, layer_types


def _gemma(config: Config) -> DecoderConfig:
    """The settings that Gemma 2 and 3 share."""
    bias = bool(config.get("attention_bias", False))
    return replace(
        base(config),
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


def gemma2(config: Config) -> DecoderConfig:
    return replace(_gemma(config), windows=windows_of(config, sliding_layers(config, lambda layer: layer % 2 == 0)))


def gemma3(config: Config) -> DecoderConfig:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    sliding = sliding_layers(config, lambda layer: (layer + 1) % pattern != 0)
    given = config.get("rope_parameters") or {}
    if "full_attention" in given or "sliding_attention" in given:
        ropes = {
            "full": {**(given.get("full_attention") or {}), **(config.get("rope_scaling") or {})},
            "sliding": dict(given.get("sliding_attention") or {}),
        }
    else:
        ropes = {"full": rope_settings(config, 1_000_000.0), "sliding": {}}
    for name, key, theta in (("full", "rope_theta", 1_000_000.0), ("sliding", "rope_local_base_freq", 10_000.0)):
        ropes[name].setdefault("rope_theta", config.get(key) or theta)
    return replace(
        _gemma(config),
        qk_norm=True,
        windows=windows_of(config, sliding),
        longest=config.get("max_position_embeddings", 2048),  # includes the scaling
        ropes=ropes,
        rope_of=tuple("sliding" if slides else "full" for slides in sliding),
    )


def gemma4(config: Config) -> DecoderConfig:
    """Gemma 4's language part, in its own config or in that of the model which also reads images and sounds."""
    if config["model_type"] == "gemma4":
        text = {**config["text_config"], "model_type": "gemma4_text"}
        described = gemma4(text)
        tied = bool(config.get("tie_word_embeddings", described.tied))
        images = isinstance(config.get("vision_config"), dict)
        return replace(described, family="gemma4", prefix="model.language_model.", tied=tied, images=images)
    own, types = gemma4_of(config), layer_types(config)
    given, experts = config.get("rope_parameters") or {}, None
    ropes = {
        "full": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        "sliding": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    for name, kind in (("full", FULL), ("sliding", SLIDING)):
        ropes[name] = dict(given.get(kind) or ropes[name])
    if config.get("enable_moe_block"):
        experts = Experts(
            count=config["num_experts"],
            chosen=config["top_k_experts"],
            size=config["moe_intermediate_size"],
            normalise=True,
            layers=(True,) * len(types),
            router="router.proj.weight",
            names=("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight", "experts.{}.down_proj.weight"),
            stem="experts",
        )
    plain = _gemma({"query_pre_attn_scalar": 1, "max_position_embeddings": 131_072, **config, "head_dim": own.dim})
    return replace(
        plain,
        scale=1.0,
        softcap=None,
        centered_norm=False,
        qk_norm=True,
        windows=windows_of({"sliding_window": 512, **config}, [kind == SLIDING for kind in types]),
        longest=plain.max_positions,
        ropes=ropes,
        rope_of=tuple("sliding" if kind == SLIDING else "full" for kind in types),
        experts=experts,
        gemma4=own,
    )
