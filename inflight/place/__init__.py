"""Where workers run."""

from inflight.place.local import Launch, WorkerProcess, start_worker

__all__ = ["Launch", "WorkerProcess", "start_worker"]
