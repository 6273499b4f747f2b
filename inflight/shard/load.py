"""Chooses the runner of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from inflight.checkpoint import open_model
from inflight.config import AdapterConfig
from inflight.contract import ShardJob, ShardOffer, StepPlan, StepResult, Transfer, Transferred
from inflight.device import Device, Ranks
from inflight.models import is_encoder
from inflight.shard.encoder_runner import EncoderRunner
from inflight.shard.runner import ModelRunner


class Runner(Protocol):
    """Runs plans."""

    @property
    def offer(self) -> ShardOffer:
        """Its capacity."""

    def run(self, plan: StepPlan) -> StepResult | None:
        """Runs one step; returns the result on rank 0, None on the others."""

    def transfer(self, order: Transfer, answer: Callable[[Transferred], None]) -> None:
        """Begins to copy between the cache and files, where the offer names a folder. Args: answer: called on another
        thread when it is done."""

    def close(self, seconds: float) -> None:
        """Ends threads, after `seconds` at most."""

    def read_adapter(self, adapter: AdapterConfig) -> Any:
        """What `add_adapter` takes. May be called on any thread, also during `run`.

        Raises:
            StartError: it cannot be read, or is not for this model.
        """

    def add_adapter(self, number: int, factors: Any) -> None:
        """Makes an adapter known to the plans that follow."""

    def drop_adapter(self, number: int) -> None:
        """Forgets an adapter, once the rows that wear it have left."""


def load_runner(job: ShardJob, ranks: Ranks, device: Device, progress: Callable[[float], None] | None = None) -> Runner:
    """Loads a rank's share of the model.

    Raises:
        StartError: a file is missing or broken, or the memory does not suffice.
    """
    model = open_model(job.model.model_dir, job.model.mmproj)
    if is_encoder(model.config, model.sentences):
        return EncoderRunner(job, device, progress, model)
    return ModelRunner(job, ranks, device, progress, model)
