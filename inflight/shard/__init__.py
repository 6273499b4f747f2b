"""What runs on the device: the persistent batch, its cache, the model, the sampler."""

from inflight.shard.runner import ModelRunner

__all__ = ["ModelRunner"]
