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
from inflight.nn.rope import Rotation, Turn

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "LayerCache",
    "ReferenceAttention",
    "RmsNorm",
    "Rotation",
    "Turn",
    "activation",
    "make_attention",
    "to_array",
    "to_tensor",
]
