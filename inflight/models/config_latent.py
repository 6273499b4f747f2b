"""Reads config.json of families with multi-head latent attention: DeepSeek-V2 and V3, GLM-4.7-Flash, MiniCPM3.

A GGUF file's config has `standard_names`: its experts are named as Qwen's checkpoints have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from inflight.checkpoint import rope_type
from inflight.models.config_base import base, rope_settings
from inflight.models.description import EXPERT_NAMES, Config, DecoderConfig, Experts, Latent


def _scale(rope: Mapping[str, Any], scale: float) -> float:
    """The scale of scores, which grows with the logarithm of YaRN's factor."""
    weight = rope.get("mscale_all_dim") or 0.0
    if rope_type(rope) == "default" or not weight or rope["factor"] <= 1:
        return scale
    return scale * float(0.1 * weight * math.log(rope["factor"]) + 1.0) ** 2


def _latent(config: Config, **defaults: Any) -> DecoderConfig:
    """What these families share; `defaults`: settings that a config may leave out."""
    settings = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    latent = Latent(
        rank=settings["kv_lora_rank"],
        rotary=settings["qk_rope_head_dim"],
        plain=settings["qk_nope_head_dim"],
        value=settings.get("v_head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        query_rank=config["q_lora_rank"] or 0 if "q_lora_rank" in config else settings["q_lora_rank"],
    )
    if latent.rotary % 2:
        raise ValueError(f"'qk_rope_head_dim' is {latent.rotary}; components are rotated in pairs")
    rope = rope_settings(settings, 10_000.0)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("'partial_rotary_factor' is not 1, where all of 'qk_rope_head_dim' is rotated")
    bias = bool(settings.get("attention_bias", False))
    return replace(
        base({**settings, "head_dim": latent.head, "num_key_value_heads": settings["num_attention_heads"]}),
        scale=_scale(rope, latent.head**-0.5),
        latent=latent,
        ropes={"all": rope},
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(settings.get("mlp_bias", False)),
    )


def _mixture(config: Config, described: DecoderConfig, layers: tuple[bool, ...], **kinds: Any) -> DecoderConfig:
    own, size = bool(config.get("standard_names")), config["moe_intermediate_size"]
    experts = Experts(
        count=config.get("n_routed_experts") or config["num_local_experts"],
        chosen=config["num_experts_per_tok"],
        size=size,
        layers=layers,
        router="mlp.gate.weight",
        names=EXPERT_NAMES,
        shared=size * int(config.get("n_shared_experts") or 0),
        shared_gated=False,
        groups=config.get("n_group") or 1,
        kept=config.get("topk_group") or 1,
        **kinds,
    )
    return replace(described, experts=experts, names={} if own else {"mlp.shared_expert": "mlp.shared_experts"})


def _deepseek_v2(config: Config) -> DecoderConfig:
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"'topk_method' is '{method}', known are greedy and group_limited_greedy")
    if config.get("moe_layer_freq", 1) != 1 or config.get("scoring_func", "softmax") != "softmax":
        raise ValueError("'moe_layer_freq' or 'scoring_func' is another one than 1 or softmax, which are known")
    described = _latent(config, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64)
    described = replace(described, interleaved=True)
    dense = config.get("first_k_dense_replace") or 0
    if described.mlp_bias and dense < described.layers:
        raise ValueError("'mlp_bias' beside experts, the shared one of which would have biases, is not read")
    settings = config if method == "group_limited_greedy" else {**config, "n_group": 1, "topk_group": 1}
    return _mixture(
        {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, **settings},
        described,
        tuple(layer >= dense for layer in range(described.layers)),
        normalise=False,  # transformers reads no `norm_topk_prob` here
        single=True,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )


def _by_sigmoids(config: Config, described: DecoderConfig, layers: tuple[bool, ...]) -> DecoderConfig:
    """Routers of V3 and GLM-4.7-Flash."""
    for key, known in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if config.get(key, known) != known:
            raise ValueError(f"'{key}' is '{config[key]}', known is {known}")
    return _mixture(
        config,
        replace(described, interleaved=bool(config.get("rope_interleave", True))),
        layers,
        normalise=bool(config.get("norm_topk_prob", True)),
        sigmoid=True,
        bias="mlp.expert_bias" if config.get("standard_names") else "mlp.gate.e_score_correction_bias",
        floor=1e-20,
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )


def _deepseek_v3(config: Config) -> DecoderConfig:
    defaults = {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    sizes = {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "q_lora_rank": 1536}
    latents = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    described = _latent(config, q_lora_rank=1536, **latents)
    dense = config.get("first_k_dense_replace", 3) or 0
    layers = tuple(layer >= dense for layer in range(described.layers))
    return _by_sigmoids({**defaults, **sizes, **config}, described, layers)


def _glm4_moe_lite(config: Config) -> DecoderConfig:
    """GLM-4.7-Flash."""
    sizes = {"n_routed_experts": 64, "n_shared_experts": 1, "moe_intermediate_size": 1536, "num_experts_per_tok": 4}
    latents = {"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}
    described = _latent(config, q_lora_rank=768, rms_norm_eps=1e-5, **latents)
    types = config.get("mlp_layer_types") or ["dense", *["sparse"] * (described.layers - 1)]
    if len(types) < described.layers or not set(types) <= {"dense", "sparse"}:
        raise ValueError("'mlp_layer_types' does not say of every layer dense or sparse")
    layers = tuple(kind == "sparse" for kind in types[: described.layers])
    return _by_sigmoids({"routed_scaling_factor": 1.8, **sizes, **config}, described, layers)


def _minicpm3(config: Config) -> DecoderConfig:
    defaults = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "rms_norm_eps": 1e-5}
    described = _latent(config, q_lora_rank=768, tie_word_embeddings=True, **defaults)
    depth, model = config.get("scale_depth", 1.4), config.get("dim_model_base", 256)
    return replace(
        described,
        embedding_scale=float(config.get("scale_emb", 12)),
        residual_scale=1.0 if depth is None else float(depth) / math.sqrt(described.layers),
        logits_divider=1.0 if model is None else described.hidden / model,
    )


LATENT: dict[str, Callable[[Config], DecoderConfig]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe_lite": _glm4_moe_lite,
    "minicpm3": _minicpm3,
}
"""The readers, by `model_type`."""
