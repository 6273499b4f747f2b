"""The worker process."""

from inflight.worker.process import run

__all__ = ["run"]
