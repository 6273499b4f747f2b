"""Generation: requests in, token streams out, shards behind."""

from inflight.engine.executor import Executor

__all__ = ["Executor"]
