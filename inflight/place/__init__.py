"""Starts, watches and ends worker processes on this machine."""

from inflight.early import DUMP
from inflight.place.cores import shares
from inflight.place.handle import STOP_GRACE, WorkerHandle
from inflight.place.local import Launch, WorkerProcess, start_worker
from inflight.place.ranks import end_ahead, shard_job, start_ahead, start_rank

__all__ = [
    "DUMP",
    "STOP_GRACE",
    "Launch",
    "WorkerHandle",
    "WorkerProcess",
    "end_ahead",
    "shard_job",
    "shares",
    "start_ahead",
    "start_rank",
    "start_worker",
]
