"""How a rank of a language model starts, and how its adapters come and go: messages beside the plans and results of
`inflight.contract.plan`."""

from __future__ import annotations

import msgspec

from inflight.config import AdapterConfig
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


class LoadAdapter(msgspec.Struct, array_like=True, frozen=True, tag=41):
    """Server to worker: read an adapter beside the steps, and know it by its number."""

    adapter: AdapterConfig


class AdapterReady(msgspec.Struct, array_like=True, frozen=True, tag=42):
    """Worker to server: plans behind this message may name the adapter; or why not, if there is a text."""

    number: int
    text: str = ""


class DropAdapter(msgspec.Struct, array_like=True, frozen=True, tag=43):
    """Server to worker: no further row will wear the adapter."""

    number: int
