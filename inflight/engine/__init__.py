"""Generation: requests in, token streams out, shards behind."""

from inflight.engine.engine import Engine
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.processes import ShardGroup

__all__ = ["Engine", "Executor", "RanksKilled", "ShardGroup"]
