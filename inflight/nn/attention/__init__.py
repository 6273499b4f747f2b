"""Attention over the paged cache."""

from __future__ import annotations

import torch

from inflight.nn.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache
from inflight.nn.attention.reference import ReferenceAttention


def make_attention(caches: list[LayerCache], block_size: int, device: torch.device) -> AttentionBackend:
    """The quickest backend for these caches on this device. Today that is the reference everywhere."""
    return ReferenceAttention(caches, block_size)


__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "LayerCache",
    "ReferenceAttention",
    "make_attention",
]
