"""Where workers run."""

from inflight.place.local import DUMP, Launch, WorkerProcess, start_worker
from inflight.place.ranks import end_ahead, start_ahead, start_rank

__all__ = ["DUMP", "Launch", "WorkerProcess", "end_ahead", "start_ahead", "start_rank", "start_worker"]
