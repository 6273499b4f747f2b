"""A rank of a language model: the persistent batch, the cache, the sampler, and the runner of plans."""

from inflight.shard.load import Runner, load_runner
from inflight.shard.runner import ModelRunner

__all__ = ["ModelRunner", "Runner", "load_runner"]
