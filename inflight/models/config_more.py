"""Reads config.json of families that differ from Llama in norms, biases, rotations and routers only.

A GGUF file's config has `standard_names`: its tensors are named as Llama's and Gemma's checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from inflight.models.config_base import base, rope_settings, sliding_layers, windows_of
from inflight.models.description import Config, DecoderConfig, Experts

_GLM4_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
EXPERT_NAMES = (
    "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.down_proj.weight",
)


def _seed_oss(config: Config) -> DecoderConfig:
    return replace(
        base({"head_dim": 128, **config}),
        qkv_bias=bool(config.get("attention_bias", True)),
        out_bias=bool(config.get("attention_out_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _arcee(config: Config) -> DecoderConfig:
    """AFM: its MLP has no gate."""
    bias = bool(config.get("attention_bias", False))
    described = base({"hidden_act": "relu2", "rms_norm_eps": 1e-5, **config})
    return replace(described, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)), gated=False)


def _glm4(config: Config) -> DecoderConfig:
    settings = {"head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5, **config}
    return replace(
        base(settings),
        qkv_bias=bool(config.get("attention_bias", True)),
        sandwich=True,
        interleaved=True,
        fused_mlp=True,
        names={} if config.get("standard_names") else _GLM4_NORMS,
    )


def _glm4_moe(config: Config) -> DecoderConfig:
    """GLM-4.5, 4.6 and 4.7: experts chosen by sigmoids, one more that every token takes, the first layers dense."""
    settings = {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, **config}
    described, own = base(settings), bool(config.get("standard_names"))
    dense, size = config.get("first_k_dense_replace", 1), config["moe_intermediate_size"]
    return replace(
        described,
        qkv_bias=bool(config.get("attention_bias", False)),
        qk_norm=bool(config.get("use_qk_norm", False)),
        experts=Experts(
            count=config.get("n_routed_experts") or config["num_local_experts"],
            chosen=config.get("num_experts_per_tok") or 8,
            size=size,
            normalise=bool(config.get("norm_topk_prob", True)),
            layers=tuple(layer >= dense for layer in range(described.layers)),
            router="mlp.gate.weight",
            names=EXPERT_NAMES,
            shared=size * int(config.get("n_shared_experts", 1) or 0),
            shared_gated=False,
            sigmoid=True,
            bias="mlp.expert_bias" if own else "mlp.gate.e_score_correction_bias",
            groups=config.get("n_group") or 1,
            kept=config.get("topk_group") or 1,
            floor=1e-20,
            scale=float(config.get("routed_scaling_factor", 1.0)),
        ),
        names={} if own else {"mlp.shared_expert": "mlp.shared_experts"},
    )


def _exaone4(config: Config) -> DecoderConfig:
    """Norms behind attention and MLP only. Where some layers have windows, the others have no positions."""
    config = {"sliding_window": 4096, **config}
    pattern = config.get("sliding_window_pattern", 4)
    slides = config["sliding_window"] is not None

    def local(layer: int) -> bool:
        if not slides or not pattern:
            return False
        if isinstance(pattern, str):
            return pattern[layer % len(pattern)] == "L"
        return (layer + 1) % int(pattern) != 0

    sliding = sliding_layers(config, local)
    return replace(
        base({"rms_norm_eps": 1e-5, **config}),
        qk_norm=True,
        sandwich=True,
        norm_first=False,
        windows=windows_of(config, sliding),
        rope_of=tuple("all" if local or not slides else None for local in sliding),
    )


def _ernie4_5(config: Config) -> DecoderConfig:
    bias = bool(config.get("use_bias", False))
    settings = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **config}
    described = replace(base(settings), qkv_bias=bias, out_bias=bias, mlp_bias=bias, interleaved=True)
    return replace(described, ropes={"all": rope_settings(config, 500_000.0)})


MORE: dict[str, Callable[[Config], DecoderConfig]] = {
    "seed_oss": _seed_oss,
    "arcee": _arcee,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "exaone4": _exaone4,
    "ernie4_5": _ernie4_5,
}
"""The readers, by `model_type`."""
