"""Layers of language models."""

from inflight.nn.attention import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionSpec", "LayerCache"]
