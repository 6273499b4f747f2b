"""Reads config.json of families that differ from Llama in norms, biases, rotations and routers only.

A GGUF file's config has `standard_names`: its tensors are named as Llama's and Gemma's checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from inflight.checkpoint import rope_type
from inflight.errors import StartError
from inflight.kernels import Growth
from inflight.models.config_base import base, rope_settings, sliding_layers, windows_of
from inflight.models.description import EXPERT_NAMES, Config, DecoderConfig, Experts

_GLM4_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _biased(config: Config, described: DecoderConfig, **more: Any) -> DecoderConfig:
    """The description with the biases that `attention_bias` asks for around attention, and more fields."""
    bias = bool(config.get("attention_bias", False))
    return replace(described, qkv_bias=bias, out_bias=bias, **more)


def _own(config: Config, names: dict[str, str]) -> dict[str, str]:
    """A family's own names of tensors; a GGUF file has the standard ones."""
    return {} if config.get("standard_names") else names


def _seed_oss(config: Config) -> DecoderConfig:
    return replace(
        base({"head_dim": 128, **config}),
        qkv_bias=bool(config.get("attention_bias", True)),
        out_bias=bool(config.get("attention_out_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _arcee(config: Config) -> DecoderConfig:
    """AFM: its MLP has no gate."""
    described = base({"hidden_act": "relu2", "rms_norm_eps": 1e-5, **config})
    return _biased(config, described, mlp_bias=bool(config.get("mlp_bias", False)), gated=False)


def _glm4(config: Config) -> DecoderConfig:
    settings = {"head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5, **config}
    return replace(
        base(settings),
        qkv_bias=bool(config.get("attention_bias", True)),
        sandwich=True,
        interleaved=True,
        fused_mlp=True,
        names=_own(config, _GLM4_NORMS),
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
        names=_own(config, {"mlp.shared_expert": "mlp.shared_experts"}),
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


MINISTRAL3_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""transformers' defaults: files leave out what equals them."""


def _ministral3(config: Config) -> DecoderConfig:
    """As Llama, but queries grow with their positions."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or MINISTRAL3_ROPE
    settings = {"head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262_144, **config}
    described = base({**settings, "rope_parameters": given})
    rope = dict(described.ropes["all"])
    factor = rope.pop("llama_4_scaling_beta", None)
    original, growth = rope.get("original_max_position_embeddings"), None
    if factor:
        if not isinstance(original, int) or original < 1:
            raise ValueError(f"original_max_position_embeddings is {original!r}, by which queries grow")
        growth = Growth(factor, original)
    return replace(
        described,
        windows=windows_of(config, [True] * described.layers),
        ropes={"all": rope},
        growth=growth,
    )


def _olmo2(config: Config) -> DecoderConfig:
    """Norms behind attention and MLP only; those of queries and keys span all heads."""
    return _biased(
        config,
        base({"rms_norm_eps": 1e-5, **config}),
        wide_norm=True,
        sandwich=True,
        norm_first=False,
    )


def _olmo3(config: Config) -> DecoderConfig:
    """Three layers of four have a window; a scaling of the rotation is that of the others."""
    theta = config.get("rope_theta") or 500_000.0
    given = config.get("rope_parameters") or {}
    full, local = given.get("full_attention"), given.get("sliding_attention")
    if full is None and local is None:
        full = {key: value for key, value in given.items() if key not in ("full_attention", "sliding_attention")}
    ropes = {"full": {**(full or {}), **(config.get("rope_scaling") or {})}, "sliding": dict(local or {})}
    for rope in ropes.values():
        rope.setdefault("rope_theta", ropes["full"].get("rope_theta") or theta)
    sliding = sliding_layers(config, lambda layer: (layer + 1) % 4 != 0)
    return replace(
        _olmo2({**config, "rope_parameters": ropes["full"], "rope_scaling": None}),
        windows=windows_of({"sliding_window": 4096, **config}, sliding),
        ropes=ropes,
        rope_of=tuple("sliding" if slides else "full" for slides in sliding),
    )


def _hunyuan(config: Config) -> DecoderConfig:
    """Hunyuan's dense models: norms of queries and keys behind the rotation, whose base `alpha` stretches."""
    if int(config.get("num_experts") or 1) > 1 or config.get("use_cla"):
        raise StartError(
            "config.json of type 'hunyuan_v1_dense' has experts or layers that share keys (num_experts, use_cla), "
            "which are not computed"
        )
    described = base({"rms_norm_eps": 1e-5, **config})
    rope, dim = dict(described.ropes["all"]), described.head_dim
    if rope_type(rope) == "dynamic" and rope.get("alpha"):
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))}
    own = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}
    return _biased(
        config,
        described,
        qk_norm=True,
        norm_rotated=True,
        ropes={"all": rope},
        names=_own(config, own),
    )


def _apertus(config: Config) -> DecoderConfig:
    """An MLP without a gate, whose activation has factors of its own."""
    if config.get("post_norm") or config.get("qk_norm") is False:
        raise StartError(
            "config.json of type 'apertus' has norms elsewhere (post_norm, qk_norm), which are not computed"
        )
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 12_000_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    given = config.get("rope_parameters") or config.get("rope_scaling") or scaled
    theta = config.get("rope_theta") or 12_000_000.0
    longest = config.get("max_position_embeddings") or 65_536
    described = base({"hidden_act": "xielu", "rms_norm_eps": 1e-5, **config, "max_position_embeddings": longest})
    own = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"}
    return _biased(
        config,
        described,
        qk_norm=True,
        gated=False,
        ropes={"all": {"rope_theta": theta, **given}},
        longest=longest,  # includes the scaling
        names=_own(config, own),
    )


_COHERE2 = {"rotary_pct": 1.0, "use_parallel_block": True, "use_gated_activation": True, "use_qk_norm": False}
"""Settings in published files of which transformers, too, computes these values only."""


def _cohere2(config: Config) -> DecoderConfig:
    """Command R7B and Command A: attention and MLP read one norm; layers without a window have no positions."""
    other = next((key for key, value in _COHERE2.items() if config.get(key, value) != value), None)
    if other is not None:
        raise StartError(f"config.json of type 'cohere2' has '{other}' {config[other]}; computed is {_COHERE2[other]}")
    pattern = config.get("sliding_window_pattern") or 4
    sliding = sliding_layers(config, lambda layer: (layer + 1) % pattern != 0)
    windows = windows_of({"sliding_window": 4096, **config}, sliding)
    settings = {"max_position_embeddings": 8192, "tie_word_embeddings": True, **config, "head_dim": None}
    return _biased(
        config,
        base({**settings, "rms_norm_eps": config.get("layer_norm_eps") or 1e-5}),
        interleaved=True,
        layer_norm=True,
        parallel=True,
        windows=windows,
        rope_of=tuple(None if window is None else "all" for window in windows),
        logits_divider=1.0 / config.get("logit_scale", 0.0625),
    )


MORE: dict[str, Callable[[Config], DecoderConfig]] = {
    "seed_oss": _seed_oss,
    "arcee": _arcee,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "exaone4": _exaone4,
    "ernie4_5": _ernie4_5,
    "ministral3": _ministral3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "hunyuan_v1_dense": _hunyuan,
    "apertus": _apertus,
    "cohere2": _cohere2,
}
"""The readers, by `model_type`."""
