"""What the readers of config.json share: settings that all families have, rotations, windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inflight.checkpoint import rope_length
from inflight.models.description import Config, DecoderConfig


def base(config: Config) -> DecoderConfig:
    """The settings that all families share, by Llama's names."""
    layers = config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope, max_positions = rope_settings(config, 10_000.0), config.get("max_position_embeddings", 2048)
    return DecoderConfig(
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=head_dim,
        intermediate=config["intermediate_size"],
        eps=config.get("rms_norm_eps", 1e-6),
        activation=config.get("hidden_act") or "silu",
        max_positions=max_positions,
        longest=rope_length(rope, max_positions),
        tied=config.get("tie_word_embeddings", False),
        scale=head_dim**-0.5,
        windows=(None,) * layers,
        ropes={"all": rope},
        rope_of=("all",) * layers,
    )


def rope_settings(config: Config, theta: float) -> dict[str, Any]:
    """Settings of the rotation, in the form of transformers 5 (`rope_parameters`) or 4 (`rope_theta`,
    `rope_scaling`, which takes precedence)."""
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = config.get("rope_theta") or theta
    if config.get("partial_rotary_factor") is not None:
        settings.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") is not None:
        settings.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return settings


def sliding_layers(config: Config, pattern: Callable[[int], bool]) -> list[bool]:
    """The layers with a sliding window: `layer_types`, else the family's pattern."""
    types = config.get("layer_types")
    count = config["num_hidden_layers"]
    return [types[i] == "sliding_attention" for i in range(count)] if types else [pattern(i) for i in range(count)]


def windows_of(config: Config, sliding: list[bool]) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    return tuple(window if slides else None for slides in sliding)
