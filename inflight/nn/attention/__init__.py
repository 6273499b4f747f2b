"""Attention over the paged cache, and what can compute it."""

from inflight.nn.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionSpec", "LayerCache"]
