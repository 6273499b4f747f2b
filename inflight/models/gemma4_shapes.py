"""What only Gemma 4's config.json has: layers that differ in their sizes, that read another layer's keys and values,
and that have embeddings of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class LayerShape:
    """One layer's sizes.

    Attributes:
        dim: of a head.
        kv_heads: heads of keys and values.
        inner: columns of the MLP.
        source: the layer whose keys and values this one reads; None: it has its own.
        twice: values are what keys are before their norm.
    """

    dim: int
    kv_heads: int
    inner: int
    source: int | None
    twice: bool


@dataclass(frozen=True)
class Gemma4:
    """What differs by layer.

    Attributes:
        dim: of the heads of layers with a window.
        shapes: of the layers.
        own_size: columns of the embedding that each layer has of its own; 0: none.
        own_rows: rows of the table with these.
    """

    dim: int
    shapes: tuple[LayerShape, ...]
    own_size: int
    own_rows: int

    def reads_another(self, layer: int) -> bool:
        """Whether a layer has no keys and values of its own."""
        return layer < len(self.shapes) and self.shapes[layer].source is not None


def layer_types(config: Config) -> list[str]:
    """The kind of each layer; the last one has full attention, whatever the config says."""
    count = int(config["num_hidden_layers"])
    given = config.get("layer_types") or [FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(count)]
    types = [str(kind) for kind in given[:count]]
    unknown = next((kind for kind in types if kind not in (SLIDING, FULL)), None)
    if unknown is not None:
        raise ValueError(f"'layer_types' has '{unknown}', known are {SLIDING} and {FULL}")
    return [*types[:-1], FULL]


def gemma4_of(config: Config) -> Gemma4:
    """The part of a description that only this family has.

    Raises:
        ValueError: settings that do not fit together.
    """
    if config.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention is 'all': it is an encoder")
    types, layers = layer_types(config), int(config["num_hidden_layers"])
    shared = int(config.get("num_kv_shared_layers") or 0)
    if not 0 <= shared < layers:
        raise ValueError(f"num_kv_shared_layers is {shared} of {layers} layers")
    shapes = tuple(_shape(config, types, layer, layers - shared) for layer in range(layers))
    size = config.get("hidden_size_per_layer_input", 256) or 0
    if not isinstance(size, int) or not 0 <= size <= 1 << 16:
        raise ValueError(f"hidden_size_per_layer_input is {size!r}")
    rows = config.get("vocab_size_per_layer_input") or config["vocab_size"]
    if size and rows < config["vocab_size"]:
        raise ValueError(f"vocab_size_per_layer_input is {rows}, below vocab_size {config['vocab_size']}")
    return Gemma4(config.get("head_dim") or 256, shapes, size, rows)


def _shape(config: Config, types: list[str], layer: int, first_shared: int) -> LayerShape:
    kind, source = types[layer], None
    if layer >= first_shared:
        source = next((each for each in range(first_shared - 1, -1, -1) if types[each] == kind), None)
        if source is None:
            raise ValueError(f"no layer of type {kind} has the keys and values that layer {layer} shares")
    heads, dim, kv_heads = config["num_attention_heads"], config.get("head_dim") or 256, config["num_key_value_heads"]
    full, equal = kind == FULL, bool(config.get("attention_k_eq_v"))
    listed = config.get("per_layer_config")
    if listed is not None:  # as transformers 5.23 writes it
        own = listed.get(str(layer)) or listed.get(kind) or {}
        dim, kv_heads = own.get("head_dim") or dim, own.get("num_key_value_heads") or kv_heads
    elif full:
        dim = config.get("global_head_dim") or 512
        kv_heads = (config.get("num_global_key_value_heads") if equal else None) or kv_heads
    if heads % kv_heads:
        raise ValueError(f"{heads} heads do not divide into {kv_heads} key heads")
    double = source is not None and bool(config.get("use_double_wide_mlp"))
    return LayerShape(dim, kv_heads, config["intermediate_size"] * (2 if double else 1), source, full and equal)
