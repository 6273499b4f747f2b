"""config.json of GGUF files with multi-head latent attention: DeepSeek-V2, V3, GLM-4.7-Flash (`deepseek2`), MiniCPM3.

In files of today the sizes of a head are those of the cache, a latent and one rotated key, and the model's own have
keys that end in `_mla`. Older files have the model's own only.
"""

from __future__ import annotations

from typing import Any

from inflight.checkpoint.gguf.file import number, whole_number
from inflight.checkpoint.gguf.parts import GgufParts
from inflight.errors import StartError

Json = dict[str, Any]

_SIGMOID = 2
"""`expert_gating_func` of routers by sigmoids, in llama.cpp's `llama_expert_gating_func_type`."""


def _sizes(file: GgufParts, config: Json) -> Json:
    """Sizes of heads and latents."""
    metadata, name = file.metadata, config["model_type"]

    def size(key: str, default: int | None = None) -> int:
        found = f"{name}.attention.{key}_mla"
        return whole_number(metadata, found if found in metadata else f"{name}.attention.{key}", default)

    rotary, rank = whole_number(metadata, f"{name}.rope.dimension_count"), f"{name}.attention.q_lora_rank"
    if size("key_length") <= rotary:
        raise StartError(f"'{file.path}' has heads of {size('key_length')} values, of which {rotary} are rotated")
    rope = dict(config["rope_parameters"])
    rope.pop("partial_rotary_factor", None)  # of the cache's heads
    if rope["rope_type"] == "yarn":  # a tenth of what Hugging Face's configs have
        weight = 10 * number(metadata, f"{name}.rope.scaling.yarn_log_multiplier")
        rope.update({"mscale": weight, "mscale_all_dim": weight} if weight else {})
    return {
        "q_lora_rank": whole_number(metadata, rank) if metadata.get(rank) else None,
        "kv_lora_rank": whole_number(metadata, f"{name}.attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": size("key_length") - rotary,
        # MiniCPM3's converter leaves it out.
        "v_head_dim": size("value_length", config["hidden_size"] // config["num_attention_heads"] or None),
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotary,
        "rope_parameters": rope,
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in file.tensors,
        "standard_names": True,
    }


def deepseek2(file: GgufParts, config: Json) -> None:
    metadata = file.metadata

    def size(key: str, default: int | None = None) -> int:
        if default is not None and not metadata.get(f"deepseek2.{key}"):
            return default
        return whole_number(metadata, f"deepseek2.{key}")

    if metadata.get("deepseek2.attention.temperature_scale"):
        raise StartError(
            f"'{file.path}' scales its queries by their positions (deepseek2.attention.temperature_scale), as Mistral "
            "Large 3 does, which is not read; use another model"
        )
    layers = config["num_hidden_layers"] - size("nextn_predict_layers", 0)  # those predict further tokens
    gating = metadata.get("deepseek2.expert_gating_func")
    sigmoid = gating == _SIGMOID or (not gating and any(name.endswith(".exp_probs_b.bias") for name in file.tensors))
    if metadata.get("deepseek2.expert_weights_norm") and not sigmoid and size("expert_count", 0):
        raise StartError(
            f"'{file.path}' divides experts' probabilities by their sum (expert_weights_norm beside a softmax), which "
            "is not computed; use another model"
        )
    dense = size("leading_dense_block_count", 0) if size("expert_count", 0) else layers
    config.update(
        _sizes(file, config),
        model_type="deepseek_v3" if sigmoid else "deepseek_v2",
        num_hidden_layers=layers,
        n_routed_experts=size("expert_count", 1),
        num_experts_per_tok=size("expert_used_count", 1),
        n_group=size("expert_group_count", 1),
        topk_group=size("expert_group_used_count", 1),
        topk_method="noaux_tc" if sigmoid else "group_limited_greedy",
        moe_intermediate_size=size("expert_feed_forward_length", config["intermediate_size"]),
        n_shared_experts=size("expert_shared_count", 0),
        first_k_dense_replace=dense,
        routed_scaling_factor=number(metadata, "deepseek2.expert_weights_scale") or 1.0,
        norm_topk_prob=bool(metadata.get("deepseek2.expert_weights_norm", False)),
    )


def minicpm3(file: GgufParts, config: Json) -> None:
    """The multipliers are those of MiniCPM3-4B, as in llama.cpp: files have none."""
    config.update(_sizes(file, config))
