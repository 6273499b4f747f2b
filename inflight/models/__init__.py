"""Language models: from a folder to something that computes logits."""

from inflight.models.base import CausalLM, ForwardBatch

__all__ = ["CausalLM", "ForwardBatch"]
