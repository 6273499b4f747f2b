"""Makes Gemma 4's config.json from a GGUF file's metadata. Source: convert_hf_to_gguf.py of ggml-org/llama.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np

from inflight.checkpoint.gguf.file import whole_number
from inflight.checkpoint.gguf.parts import GgufParts
from inflight.errors import StartError

Json = dict[str, Any]


def gemma4(file: GgufParts, config: Json) -> None:
    """Completes the config. Sizes by layer become `per_layer_config`, as transformers writes it.

    Raises:
        StartError: a key is missing or invalid; the text names it.
    """
    layers, metadata = config["num_hidden_layers"], file.metadata
    full, key = config["head_dim"], "gemma4.attention."
    narrow = whole_number(metadata, f"{key}key_length_swa", full)
    default = [int((layer + 1) % 6 != 0) for layer in range(layers)]
    kinds = _by_layer(file, f"{key}sliding_window_pattern", default, least=0)
    kv_heads = _by_layer(file, f"{key}head_count_kv", [config["num_key_value_heads"]] * layers)
    inner = _by_layer(file, "gemma4.feed_forward_length", [config["intermediate_size"]] * layers)
    shared = _count(file, f"{key}shared_kv_layers")
    values = [f"blk.{layer}.attn_v.weight" in file.tensors for layer in range(max(1, layers - shared))]
    double = shared > 0 and inner[-1] == 2 * inner[0]
    if any(size != inner[0] * (2 if double and layer >= layers - shared else 1) for layer, size in enumerate(inner)):
        raise StartError(f"'{file.path}' has MLPs of {inner} columns; layers that share may have twice those of others")
    own = _count(file, "gemma4.embedding_length_per_layer_input")
    config.update(
        model_type="gemma4_text",
        # Files leave it out: the tokens of an image see each other in the models without embeddings of the layers.
        use_bidirectional_attention=None if own else "vision",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=narrow,
        sliding_window=whole_number(metadata, f"{key}sliding_window", 512),
        layer_types=["sliding_attention" if slides else "full_attention" for slides in kinds],
        per_layer_config={
            str(layer): {"head_dim": narrow if kinds[layer] else full, "num_key_value_heads": kv_heads[layer]}
            for layer in range(layers)
        },
        num_kv_shared_layers=shared,
        use_double_wide_mlp=double,
        attention_k_eq_v=not all(values),
        hidden_size_per_layer_input=own,
        vocab_size_per_layer_input=config["vocab_size"],
        final_logit_softcapping=_positive(file, "gemma4.final_logit_softcapping", None),
        rope_parameters=_ropes(file, config["rope_parameters"]["rope_theta"]),
    )
    if _count(file, "gemma4.expert_count"):
        config.update(
            enable_moe_block=True,
            num_experts=whole_number(metadata, "gemma4.expert_count"),
            top_k_experts=whole_number(metadata, "gemma4.expert_used_count"),
            moe_intermediate_size=whole_number(metadata, "gemma4.expert_feed_forward_length"),
        )


def _ropes(file: GgufParts, theta: float) -> Json:
    full = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": _rotated(file)}
    local = _positive(file, "gemma4.rope.freq_base_swa", 10_000.0)
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _by_layer(file: GgufParts, key: str, usual: list[int], least: int = 1) -> list[int]:
    """A key's numbers by layer; `usual`: those of a key that is no list."""
    found = file.metadata.get(key)
    if not isinstance(found, list):
        return usual
    if len(found) != len(usual) or not all(isinstance(each, int) and least <= each < 1 << 31 for each in found):
        raise StartError(f"the GGUF file's key '{key}' is no list of {len(usual)} numbers; download it again")
    return [int(each) for each in found]


def _count(file: GgufParts, key: str) -> int:
    return whole_number(file.metadata, key) if file.metadata.get(key) else 0


def _positive(file: GgufParts, key: str, default: float | None) -> float | None:
    value = file.metadata.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e15 else default


def _rotated(file: GgufParts) -> float:
    """The share of a head that full attention rotates: the frequencies of the others have huge divisors."""
    placed = file.tensors.get("rope_freqs.weight")
    if placed is None or placed.info.type.name != "F32" or len(placed.info.shape) != 1 or not placed.info.shape[0]:
        return 0.25
    factors = placed.bytes().view(np.float32)
    return float(np.count_nonzero(factors < 1e6) / len(factors))
