"""Distributed servables: one classic model on a group of ranks, each an agent's process, on this machine or others."""

from inflight.config import AgentsConfig
from inflight.distributed.group import GroupModel, Loss, RankGroup
from inflight.distributed.launcher import Launcher
from inflight.distributed.table import RankTable, check_ranks, read_rank_table

__all__ = [
    "AgentsConfig",
    "GroupModel",
    "Launcher",
    "Loss",
    "RankGroup",
    "RankTable",
    "check_ranks",
    "read_rank_table",
]
