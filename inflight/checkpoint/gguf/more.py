"""config.json of GGUF files whose families differ from Llama in norms, biases, rotations and routers only."""

from __future__ import annotations

from typing import Any

from inflight.checkpoint.gguf.file import whole_number
from inflight.checkpoint.gguf.parts import GgufParts

Json = dict[str, Any]


def _biased(file: GgufParts, part: str) -> bool:
    return f"blk.0.{part}.bias" in file.tensors


def seed_oss(file: GgufParts, config: Json) -> None:
    config.update(
        attention_bias=_biased(file, "attn_q"),
        attention_out_bias=_biased(file, "attn_output"),
        mlp_bias=_biased(file, "ffn_down"),
    )


def arcee(file: GgufParts, config: Json) -> None:
    config.update(attention_bias=_biased(file, "attn_q"), mlp_bias=_biased(file, "ffn_down"))


def ernie(file: GgufParts, config: Json) -> None:
    config["use_bias"] = _biased(file, "attn_q")


def glm4(file: GgufParts, config: Json) -> None:
    config.update(standard_names=True, attention_bias=_biased(file, "attn_q"))


def glm4_moe(file: GgufParts, config: Json) -> None:
    metadata = file.metadata

    def size(key: str, default: int | None = None) -> int:
        if default is not None and not metadata.get(f"glm4moe.{key}"):
            return default
        return whole_number(metadata, f"glm4moe.{key}")

    further = size("nextn_predict_layers", 0)  # blocks that predict further tokens
    layers = config["num_hidden_layers"] - further
    dense = size("leading_dense_block_count", 0)
    config.update(
        model_type="glm4_moe",
        standard_names=True,
        num_hidden_layers=layers,
        attention_bias=_biased(file, "attn_q"),
        use_qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        n_routed_experts=size("expert_count"),
        num_experts_per_tok=size("expert_used_count"),
        n_group=size("expert_group_count", 1),
        topk_group=size("expert_group_used_count", 1),
        moe_intermediate_size=size("expert_feed_forward_length"),
        n_shared_experts=size("expert_shared_count", 0),
        first_k_dense_replace=dense,
        routed_scaling_factor=_scale(metadata.get("glm4moe.expert_weights_scale")),
        norm_topk_prob=bool(metadata.get("glm4moe.expert_weights_norm", True)),
    )


def _scale(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and value else 1.0


def exaone4(file: GgufParts, config: Json) -> None:
    """Without a pattern three layers of four have a window, always so for the large model in llama.cpp."""
    key = "exaone4.attention.sliding_window"
    window = whole_number(file.metadata, key) if file.metadata.get(key) else None
    config.update(sliding_window=window, sliding_window_pattern=4)
