"""Attention over the paged cache."""

from __future__ import annotations

from inflight.nn.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache
from inflight.nn.attention.reference import ReferenceAttention


def make_attention(caches: list[LayerCache], block_size: int) -> AttentionBackend:
    """The attention backend for these caches: the reference, on every device."""
    return ReferenceAttention(caches, block_size)


__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "LayerCache",
    "ReferenceAttention",
    "make_attention",
]
