"""Starts, watches and ends worker processes on this machine, and on those of a cluster."""

from inflight.early import DUMP
from inflight.place.cluster import Cluster, OnCluster
from inflight.place.cores import shares
from inflight.place.handle import STOP_GRACE, Process, WorkerHandle
from inflight.place.local import Launch, WorkerProcess, start_worker
from inflight.place.placement import Here, PlacedRank, Placement
from inflight.place.ranks import end_ahead, shard_job, start_ahead, start_rank
from inflight.place.remote import RemoteProcess
from inflight.place.workers import PlacedWorker, WorkerHere, WorkerOnCluster, WorkerPlace

__all__ = [
    "DUMP",
    "STOP_GRACE",
    "Cluster",
    "Here",
    "Launch",
    "OnCluster",
    "PlacedRank",
    "PlacedWorker",
    "Placement",
    "Process",
    "RemoteProcess",
    "WorkerHandle",
    "WorkerHere",
    "WorkerOnCluster",
    "WorkerPlace",
    "WorkerProcess",
    "end_ahead",
    "shard_job",
    "shares",
    "start_ahead",
    "start_rank",
    "start_worker",
]
