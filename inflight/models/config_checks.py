"""Checks of the numbers in a config.json, so that a wrong config cannot make a load take memory or time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inflight.errors import StartError
from inflight.models.description import DecoderConfig
from inflight.models.recurrences import DeltaNet

_MOST = {
    "num_hidden_layers": 10_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
    "n_shared_experts": 100_000,
    "num_experts_per_tok": 100_000,
    "top_k_experts": 100_000,
}
_SIZES = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "moe_intermediate_size", "sliding_window", "sliding_window_pattern",
    "decoder_sparse_step", "no_rope_layer_interval", "full_attention_interval", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
    "shared_expert_intermediate_size", "global_head_dim", "num_global_key_value_heads",
    "vocab_size_per_layer_input", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "dim_model_base", *_MOST,
)  # fmt: skip
_NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "partial_rotary_factor", "routed_scaling_factor", "scale_emb", "scale_depth",
)  # fmt: skip
_OTHERS = (
    (list, "a list", ("layer_types", "no_rope_layers", "mlp_only_layers")),
    (str, "a text", ("hidden_act", "hidden_activation")),
    (
        bool,
        "true or false",
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "attention_k_eq_v"),
    ),
)
_BY_LAYER = ("head_dim", "num_key_value_heads")
_LARGEST = 1 << 31
_MOST_HEADS, _WIDEST_HEAD = 1 << 16, 1 << 16


def check_config(config: Mapping[str, Any]) -> None:
    """Raises StartError if a setting of the decoder has a wrong type or range; the text names it."""
    for key in _SIZES:
        value, most = config.get(key), _MOST.get(key, _LARGEST)
        if value is None or (key.endswith("_experts") and value == 0):
            continue
        if key == "sliding_window_pattern" and (value == 0 or isinstance(value, str)):  # of EXAONE 4: none, or LLLG
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise StartError(f"'{key}' in config.json is {_short(value)}; it must be a whole number from 1 to {most}")
    for key in _NUMBERS:
        if config.get(key) is not None and not _is_number(config[key]):
            raise StartError(f"'{key}' in config.json is {_short(config[key])}; it must be a number")
    for kind, what, keys in _OTHERS:
        for key in keys:
            if config.get(key) is not None and not isinstance(config[key], kind):
                raise StartError(f"'{key}' in config.json is {_short(config[key])}; it must be {what}")
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if types and len(types) < (layers or 0):
        raise StartError(f"'layer_types' in config.json has {len(types)} entries for {layers} layers")
    _check_layers(config.get("per_layer_config"))
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(key, config.get(key))


def check_described(config: DecoderConfig) -> None:
    """Raises ValueError if a size of a description is missing or none, or a number is none: families take these from
    settings of many names."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_positions,
    }
    numbers = {
        "the norms' epsilon": config.eps,
        "the scale of scores": config.scale,
        "the embedding's multiplier": config.embedding_scale,
        "the residual multiplier": config.residual_scale,
        "the logits' scaling": config.logits_divider,
    }
    experts = config.experts
    if experts is not None and any(experts.layers):
        sizes |= {
            "the number of experts": experts.count,
            "the number of a token's experts": experts.chosen,
            "the experts' intermediate size": experts.size,
            "the number of experts' groups": experts.groups,
            "the number of a token's groups": experts.kept,
        }
        if experts.shared != 0:
            sizes["the shared expert's intermediate size"] = experts.shared
        numbers["the scale of experts"] = experts.scale
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= _LARGEST:
            raise ValueError(f"{name} is {_short(size)}; it must be a whole number from 1")
    widest = max([config.head_dim, *([] if config.gemma4 is None else [each.dim for each in config.gemma4.shapes])])
    if widest > _WIDEST_HEAD:
        raise ValueError(f"heads of {widest} values; {_WIDEST_HEAD} is the most")
    heads = [config.heads, config.kv_heads]  # pieces of tensors are listed head by head
    if isinstance(config.recurrence, DeltaNet):
        heads += [config.recurrence.shape.key_heads, config.recurrence.shape.value_heads]
    if max(heads) * max(1, widest // 1024) > _MOST_HEADS:
        raise ValueError(f"{max(heads)} heads of {widest} values")
    for name, number in numbers.items():
        if not _is_number(number):
            raise ValueError(f"{name} is {_short(number)}; it must be a number")
    if not config.logits_divider:
        raise ValueError("the logits' scaling is 0, by which logits are divided")


def _check_layers(settings: Any) -> None:
    """Checks the sizes that single layers have (`per_layer_config`)."""
    layers = settings.values() if isinstance(settings, Mapping) else [] if settings is None else [settings]
    for layer in layers:
        sizes = [layer.get(key) for key in _BY_LAYER] if isinstance(layer, Mapping) else [layer]
        if not all(size is None or (type(size) is int and 1 <= size <= _LARGEST) for size in sizes):
            raise StartError(
                f"'per_layer_config' in config.json has {_short(layer)}; sizes must be whole numbers by name"
            )


def _check_rope(key: str, settings: Any, depth: int = 0) -> None:
    """Checks a rotation's settings: numbers, texts, switches, lists of numbers, or mappings of these by layer type."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise StartError(f"'{key}' in config.json is {_short(settings)}; it must be an object")
    for name, value in settings.items():
        if isinstance(value, Mapping) and not depth:
            _check_rope(f"{key}.{name}", value, 1)
        elif not _is_rope_value(name, value):
            raise StartError(f"'{key}.{name}' in config.json is {_short(value)}; it must be a number or a row of them")


def _is_rope_value(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return name in ("rope_type", "type")
    if isinstance(value, list):
        return len(value) <= 1 << 16 and all(map(_is_number, value))
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
