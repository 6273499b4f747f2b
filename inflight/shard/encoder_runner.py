"""Runs models that read whole texts (BERT and others): each of a plan's prompts becomes a vector, or the scores of
labels, without a cache and without sampling.

The plans are those of any language model, so admission, deadlines and replay are the same: a row decodes once, and its
result is a vector. Prompts may come in chunks; the model computes a prompt with its last chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from inflight.checkpoint import ModelFolder
from inflight.config import AdapterConfig
from inflight.contract import (
    CacheSize,
    ModelFacts,
    Pooled,
    ShardJob,
    ShardOffer,
    StepPlan,
    StepResult,
    Transfer,
    Transferred,
)
from inflight.device import Device
from inflight.errors import StartError
from inflight.models import Text, load_encoder
from inflight.shard.input_batch import InputBatch
from inflight.shard.plan_checks import checked_plan

_TASKS: Mapping[str, Pooled] = {
    "last": "embed", "mean": "embed", "tokens": "tokens", "sparse": "sparse", "scores": "scores",
}  # fmt: skip
"""What a request wants, by `Sampling.pooling`; one that says nothing gets what the model computes first."""


class EncoderRunner:
    """The `ModelRunner` of models that compute a text at once. One rank only.

    Attributes:
        offer: its capacity.
    """

    def __init__(
        self,
        job: ShardJob,
        device: Device,
        progress: Callable[[float], None] | None = None,
        folder: ModelFolder | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: the job's model, if it is open already.

        Raises:
            StartError: it cannot be loaded, or not on several ranks.
        """
        if job.world_size != 1:
            raise StartError("an encoder runs on one device; leave out --tensor-parallel")
        if job.model.draft_model is not None:
            raise StartError("--draft-model guesses tokens, and an encoder writes none; leave it out")
        self._model = model = load_encoder(job.model, device, folder)
        if progress is not None:
            progress(1.0)
        longest = min(model.longest, job.max_model_len or model.longest)
        self._batch = InputBatch(job.max_rows, job.model.block_size)
        self._step = 0
        model.encode([Text(np.zeros(2, np.int64), wanted=model.tasks[0])])
        # Nothing is cached: the number of blocks only limits the tokens that the scheduler runs at once.
        blocks = -(-(longest + 1) * job.max_rows // job.model.block_size)
        facts = ModelFacts("encoder", model.dtype, model.vocab_size, model.weight_bytes)
        cache = CacheSize(blocks, job.model.block_size)
        self.offer = ShardOffer(facts, cache, job.max_rows, longest + 1, device.type, model.size)

    def read_adapter(self, adapter: AdapterConfig) -> Any:
        raise StartError(f"adapter '{adapter.name}': encoders take no adapters")

    def add_adapter(self, number: int, factors: Any) -> None:
        raise AssertionError("an encoder reads no adapters")

    def drop_adapter(self, number: int) -> None:
        return None

    def run(self, plan: StepPlan) -> StepResult:
        """Runs one step."""
        began = time.perf_counter()
        assert plan.step == self._step, f"plan {plan.step} came, {self._step} was next"
        self._step += 1
        plan, failed = checked_plan(plan, self._model.vocab_size)
        batch = self._batch
        chunks = batch.apply(plan)
        if not batch.ids:
            return StepResult(plan.step, [], [], seconds=time.perf_counter() - began)
        step = batch.step(chunks, plan.hold)
        texts: list[Text] = []
        for row in step.sampled:
            sampling = batch.sampling[row]
            wanted = _TASKS.get(sampling.pooling, self._model.tasks[0])
            if wanted not in self._model.tasks:
                failed[batch.ids[row]] = f"the model computes {' and '.join(self._model.tasks)} of a text, not {wanted}"
                wanted = self._model.tasks[0]
            tokens = batch.tokens[row, : batch.known[row]].astype(np.int64)
            texts.append(Text(tokens, sampling.pooled_from, sampling.second_from, wanted))
        found = self._model.encode(texts)
        vectors = {batch.ids[row]: vector.tobytes() for row, vector in zip(step.sampled, found)}
        zeros = np.zeros(len(step.sampled), np.int64)
        ids = [batch.ids[row] for row in step.sampled]
        batch.append(step.sampled, zeros)
        seconds = time.perf_counter() - began
        return StepResult(plan.step, ids, zeros.tolist(), seconds=seconds, embeddings=vectors, failed=failed)

    def transfer(self, order: Transfer, answer: Callable[[Transferred], None]) -> None:
        """Does nothing: there is no cache."""
        answer(Transferred(order.number, 0))

    def close(self, seconds: float) -> None:
        """Does nothing."""
