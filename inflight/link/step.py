"""How a rank of a language model starts: messages beside the plans and results of `inflight.plan`."""

from __future__ import annotations

from typing import Any

import msgspec


class LoadShard(msgspec.Struct, array_like=True, frozen=True, tag=12):
    """Server to worker, first of all: this process is a rank (`inflight.plan.ShardJob` as builtins)."""

    job: dict[str, Any]


class ShardReady(msgspec.Struct, array_like=True, frozen=True, tag=13):
    """Worker to server: loaded and warmed up (`inflight.plan.ShardOffer` as builtins)."""

    offer: dict[str, Any]


class Progress(msgspec.Struct, array_like=True, frozen=True, tag=14):
    """Worker to server: how much of the weights is loaded, 0 to 1."""

    done: float
