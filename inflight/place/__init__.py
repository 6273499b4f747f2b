"""Where workers run."""

from inflight.place.local import DUMP, Launch, WorkerProcess, start_worker

__all__ = ["DUMP", "Launch", "WorkerProcess", "start_worker"]
