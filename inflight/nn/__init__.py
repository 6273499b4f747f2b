"""Layers and attention."""

from inflight.nn.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    LayerCache,
    ReferenceAttention,
    make_attention,
)
from inflight.nn.border import to_array, to_tensor
from inflight.nn.layers import Activation, RmsNorm, activation
from inflight.nn.rope import Rope, make_rope, rope_length, rope_type

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "LayerCache",
    "ReferenceAttention",
    "RmsNorm",
    "Rope",
    "activation",
    "make_attention",
    "make_rope",
    "rope_length",
    "rope_type",
    "to_array",
    "to_tensor",
]
