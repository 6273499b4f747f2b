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
from inflight.nn.layers import Activation, EvenNorm, Gate, RmsNorm, activation, gating, xielu
from inflight.nn.rope import CosSin, Rotation

__all__ = [
    "Activation",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "CosSin",
    "EvenNorm",
    "Gate",
    "LayerCache",
    "ReferenceAttention",
    "RmsNorm",
    "Rotation",
    "activation",
    "gating",
    "make_attention",
    "to_array",
    "to_tensor",
    "xielu",
]
