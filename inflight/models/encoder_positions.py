"""Where the tokens of an encoder's text stand: rotations, windows, and what scores gain by the tokens' distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from inflight.contract import Array
from inflight.models.encoder_forms import EncoderForm
from inflight.tensors import Floats

_LOCAL = {"modernbert": ("global_attn_every_n_layers", 3), "gemma3_text": ("sliding_window_pattern", 6)}
"""Families whose layers see neighbours only, but for every n-th: where config.json has n, and its default."""
_THETAS = {
    "modernbert": (("full_attention", "global_rope_theta", 160000.0), ("sliding_attention", "local_rope_theta", 1e4)),
    "gemma3_text": (("full_attention", "rope_theta", 1e6), ("sliding_attention", "rope_local_base_freq", 1e4)),
}
"""Their rotations: of layers that see all, then of local ones; keys of `rope_parameters`, older keys, defaults."""
MPNET_BUCKETS = 32


def ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What config.json says of rotations."""
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    nested = [each for one in found if isinstance(one, Mapping) for each in one.values()]
    return [one for one in (*found, *nested) if isinstance(one, Mapping)]


def is_local(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer sees only neighbours."""
    kind = str(config.get("model_type"))
    if kind not in _LOCAL:
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return str(kinds[index]) == "sliding_attention"
    name, usual = _LOCAL[kind]
    every = int(config.get(name) or config.get(f"_{name}") or usual)
    return bool((index + 1) % every if kind == "gemma3_text" else index % every)


def window(config: Mapping[str, Any]) -> int:
    """Tokens before and behind that a token of a local layer sees."""
    if config.get("model_type") == "gemma3_text":
        return int(config.get("sliding_window") or 4096) // 2
    return int(config.get("local_attention", 128)) // 2


def turns(form: EncoderForm, config: Mapping[str, Any], dim: int) -> list[Floats]:
    """Inverse frequencies [dim / 2] of the rotation; with local layers, first of those that see all."""
    if form.theta is None:
        return []
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or form.theta
    thetas = [float(theta)]
    names = _THETAS.get(str(config.get("model_type")))
    if names is not None:
        thetas = [
            float((rope.get(kind) or {}).get("rope_theta") or config.get(old) or usual) for kind, old, usual in names
        ]
    steps = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return [np.asarray(1.0 / theta**steps, np.float32) for theta in thetas]


def angles(places: Array, inverse: Floats) -> Floats:
    """Cosines, then sines: float32 [T, dim]."""
    found = places.astype(np.float32)[:, None] * inverse
    return np.concatenate([np.cos(found), np.sin(found)], axis=1)


def mpnet_bias(table: Floats, reach: int) -> Floats:
    """MPNet's values by distance, float32 [heads, 2 * reach - 1] by key - query + reach - 1.

    Args:
        table: [32, heads], by buckets of distances: exact up to 7, then by their logarithm, up to 128 (T5's way).
    """
    distance = np.arange(reach - 1, -reach, -1)  # query - key
    half, exact = MPNET_BUCKETS // 2, MPNET_BUCKETS // 4
    size = np.abs(distance)
    wide = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(128 / exact))
    far = np.minimum(exact + (wide * np.float32(half - exact)).astype(np.int64), half - 1)
    buckets = np.where(distance < 0, half, 0) + np.where(size < exact, size, far)
    return np.ascontiguousarray(table[buckets].T, np.float32)


def deberta_places(reach: int, buckets: int, longest: int) -> Array:
    """The row of DeBERTa's table of relative embeddings, int64 [2 * reach - 1] by query - key + reach - 1.

    Args:
        buckets: of distances on each side: exact up to half of them, then by their logarithm; below 1: all are exact.
        longest: the largest distance that has a row of its own.
    """
    distance = np.arange(1 - reach, reach)
    span = buckets if buckets > 0 else longest
    found = distance
    if buckets > 0:
        middle = buckets // 2
        size = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance))
        scale = np.log(np.float32((longest - 1) / middle), dtype=np.float32)
        wide = np.log(size.astype(np.float32) / np.float32(middle)) / scale * np.float32(middle - 1)
        found = np.where(size <= middle, distance, (np.ceil(wide) + middle).astype(np.int64) * np.sign(distance))
    return np.clip(found + span, 0, 2 * span - 1)
