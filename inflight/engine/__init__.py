"""Generation: requests in, token streams out, shards behind."""

from inflight.engine.engine import Engine
from inflight.engine.executor import Executor, RanksKilled

__all__ = ["Engine", "Executor", "RanksKilled"]
