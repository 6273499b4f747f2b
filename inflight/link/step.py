"""How a rank of a language model starts: messages beside the plans and results of `inflight.contract.plan`."""

from __future__ import annotations

import msgspec

from inflight.contract import ShardJob, ShardOffer


class LoadShard(msgspec.Struct, array_like=True, frozen=True, tag=12):
    """Server to worker, first of all: this process is a rank."""

    job: ShardJob


class ShardReady(msgspec.Struct, array_like=True, frozen=True, tag=13):
    """Worker to server: loaded and warmed up."""

    offer: ShardOffer


class Progress(msgspec.Struct, array_like=True, frozen=True, tag=14):
    """Worker to server: how much of the weights is loaded, 0 to 1."""

    done: float
