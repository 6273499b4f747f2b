"""The generation engine: takes requests, runs steps on the model's shards, gives back streams of tokens."""

from inflight.engine.engine import Engine
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.images import Images, truncated
from inflight.engine.processes import ShardGroup

__all__ = ["Engine", "Executor", "Images", "RanksKilled", "ShardGroup", "truncated"]
