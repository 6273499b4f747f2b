"""What config.json files of well-known models say of rotations, old forms and new: read as transformers reads them.

Sizes and settings are those of the published files; what has nothing to do with rotations is left out.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from inflight.checkpoint import make_rope
from inflight.errors import StartError
from inflight.models.config import decoder_config

Config = dict[str, Any]


def llama(hidden: int, heads: int, kv: int, longest: int, **more: Any) -> Config:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": 2 * hidden, "num_hidden_layers": 4, "vocab_size": 32000,
        "max_position_embeddings": longest, "rms_norm_eps": 1e-5, "hidden_act": "silu", **more,
    }  # fmt: skip


def like(config: Config, family: str, **more: Any) -> Config:
    return {**config, "model_type": family, **more}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN = like(llama(3584, 28, 4, 32768), "qwen2", use_sliding_window=False, sliding_window=131072, max_window_layers=28)
QWEN3 = like(llama(4096, 32, 8, 40960), "qwen3", head_dim=128)
PHI = like(llama(3072, 32, 32, 131072), "phi3", pad_token_id=0)
FACTORS = {"short_factor": [1.0 + i / 50 for i in range(48)], "long_factor": [1.0 + i * 1.3 for i in range(48)]}
GEMMA = like(
    llama(1152, 4, 1, 32768),
    "gemma3_text",
    num_hidden_layers=6,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=512,
)
GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]

READ: dict[str, tuple[Config, int]] = {
    "Llama 2 7B": (llama(4096, 32, 32, 4096, rope_scaling=None), 4096),
    "TinyLlama": (llama(2048, 32, 4, 2048, rope_theta=10000.0, rope_scaling=None), 2048),
    "CodeLlama": (llama(4096, 32, 32, 16384, rope_theta=1000000), 16384),
    "Yi 34B 200K": (llama(7168, 56, 8, 200000, rope_theta=5000000.0), 200000),
    "Llama 3 8B": (llama(4096, 32, 8, 8192, rope_theta=500000.0, rope_scaling=None), 8192),
    "Llama 3.1 8B": (
        llama(4096, 32, 8, 131072, rope_theta=500000.0, rope_scaling={**LLAMA3, "rope_type": "llama3", "factor": 8.0}),
        131072,
    ),
    "Llama 3.2 1B, newly saved": (
        llama(
            2048, 32, 8, 131072, head_dim=64,
            rope_parameters={**LLAMA3, "rope_type": "llama3", "factor": 32.0, "rope_theta": 500000.0},
        ),
        131072,
    ),
    "DeepSeek R1 Distill Llama 8B": (
        llama(4096, 32, 8, 131072, rope_theta=500000.0, rope_scaling={**LLAMA3, "rope_type": "llama3", "factor": 8.0}),
        131072,
    ),
    "DeepSeek Coder 6.7B": (
        llama(4096, 32, 32, 16384, rope_theta=100000, rope_scaling={"type": "linear", "factor": 4.0}), 65536,
    ),
    "Yarn Llama 2 7B 128K": (
        llama(
            4096, 32, 32, 131072,
            rope_scaling={
                "factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True,
            },
        ),
        131072,
    ),
    "SmolLM2 135M": (
        llama(576, 9, 3, 8192, rope_theta=100000, rope_interleaved=False, rope_scaling=None, head_dim=None), 8192,
    ),
    "SmolLM3 3B": (
        like(llama(2048, 16, 4, 65536, rope_theta=5000000.0, no_rope_layers=[1, 1, 1, 0]), "smollm3", pad_token_id=0),
        65536,
    ),
    "Qwen2.5 7B": ({**QWEN, "rope_theta": 1000000.0}, 32768),
    "Qwen2.5 7B with YaRN": (
        {
            **QWEN, "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        131072,
    ),
    "DeepSeek R1 Distill Qwen 7B": ({**QWEN, "rope_theta": 10000, "max_position_embeddings": 131072}, 131072),
    "Qwen3 8B": ({**QWEN3, "rope_theta": 1000000, "rope_scaling": None}, 40960),
    "Qwen3 8B with YaRN": (
        {
            **QWEN3, "rope_theta": 1000000,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "Qwen3 8B with YaRN, no original length": (
        {**QWEN3, "rope_theta": 1000000, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 81920,
    ),
    "Qwen3 8B, newly saved": (
        {
            **QWEN3,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0,
            },
        },
        131072,
    ),
    "Mistral 7B v0.1": (like(llama(4096, 32, 8, 32768, rope_theta=10000.0), "mistral", sliding_window=4096), 32768),
    "Mistral Nemo": (
        like(llama(5120, 32, 8, 131072, rope_theta=1000000.0), "mistral", head_dim=128, sliding_window=None), 131072,
    ),
    "Mixtral 8x7B": (
        like(
            llama(4096, 32, 8, 32768, rope_theta=1000000.0), "mixtral", num_local_experts=8, num_experts_per_tok=2,
            sliding_window=None,
        ),
        32768,
    ),
    "Granite 3.3 2B": (
        like(
            llama(2048, 32, 8, 131072, rope_theta=10000000.0, rope_scaling=None), "granite",
            attention_multiplier=0.015625,
            embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0,
        ),
        131072,
    ),
    "Phi-3 mini 4K": (
        {**PHI, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
         "rope_scaling": None, "sliding_window": 2047},
        4096,
    ),
    "Phi-3 mini 128K, first form": (
        {**PHI, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
         "rope_scaling": {**FACTORS, "type": "su"}, "sliding_window": 262144},
        131072,
    ),
    "Phi-3.5 mini": (
        {**PHI, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
         "rope_scaling": {**FACTORS, "type": "longrope"}, "sliding_window": 262144},
        131072,
    ),
    "Phi-4 mini": (
        {**PHI, "num_attention_heads": 24, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
         "partial_rotary_factor": 0.75, "rope_theta": 10000.0, "rope_scaling": {**FACTORS, "type": "longrope"}},
        131072,
    ),
    "Phi-4": (
        {**PHI, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10, "rope_theta": 250000,
         "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_scaling": None},
        16384,
    ),
    "Gemma 2 2B": (
        like(
            llama(2304, 8, 4, 8192, rope_theta=10000.0), "gemma2", head_dim=256, query_pre_attn_scalar=256,
            sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        ),
        8192,
    ),
    "Gemma 3 1B": (
        {**GEMMA, "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window_pattern": 6},
        32768,
    ),
    "Gemma 3 4B's text": (
        {**GEMMA, "rope_theta": 1000000, "rope_local_base_freq": 10000, "max_position_embeddings": 131072,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 6},
        131072,
    ),
    "Gemma 3, newly saved": (
        {
            **GEMMA, "layer_types": GEMMA_LAYERS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
            },
        },
        32768,
    ),
}  # fmt: skip


def of_transformers(config: Config) -> dict[str, tuple[torch.Tensor, float]]:
    """Frequencies and factor by the kind of a layer; of short sequences where they depend on the length."""
    import transformers

    family = config["model_type"]
    given = {key: value for key, value in config.items() if key != "model_type"}
    if (given.get("rope_scaling") or {}).get("type") == "su":  # longrope's first name
        given["rope_scaling"] = {**given["rope_scaling"], "type": "longrope"}
    made = transformers.AutoConfig.for_model(family, **given)
    module = family.removesuffix("_text")
    source = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    names = [name for name in vars(source) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    rotary = getattr(source, names[0])(made)
    if hasattr(rotary, "inv_freq"):
        return {"": (rotary.inv_freq, float(rotary.attention_scaling))}
    return {
        kind: (getattr(rotary, f"{kind}_inv_freq"), float(getattr(rotary, f"{kind}_attention_scaling")))
        for kind in ("full_attention", "sliding_attention")
    }


@pytest.mark.parametrize("name", READ)
def test_a_published_config(name: str) -> None:
    config, longest = READ[name]
    described = decoder_config(config)
    assert described is not None
    assert described.longest == longest
    wanted = of_transformers(config)
    found = [make_rope(settings, described.head_dim, described.max_positions) for settings in described.ropes.values()]
    assert len(found) == len(wanted)
    for frequencies, factor in wanted.values():
        assert any(
            rope.inverse.shape == frequencies.shape
            and np.allclose(rope.inverse, frequencies.float().numpy(), rtol=1e-5, atol=0)
            and rope.factor == pytest.approx(factor)
            for rope in found
        ), (wanted, found)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "'mrope' rotates tokens by their places in images"),
        ({"rope_type": "ntk", "factor": 2.0}, "rope type 'ntk' is unknown; known are default, linear, dynamic, yarn"),
    ],
)
def test_what_is_refused(settings: Config, text: str) -> None:
    described = decoder_config({**QWEN, "rope_theta": 1000000.0, "rope_scaling": settings})
    assert described is not None
    (rope,) = described.ropes.values()
    with pytest.raises(StartError, match=text):
        make_rope(rope, described.head_dim, described.max_positions)


@pytest.mark.parametrize("family", ["olmo", "qwen2_vl", "cohere", "deepseek_v32"])
def test_families_that_transformers_computes(family: str) -> None:
    """They go to the bridge, which has its own checks."""
    assert decoder_config(like(llama(512, 8, 8, 4096), family)) is None
