"""Runs encoders (BERT and others): a plan's prompts become one vector each, without a cache and without sampling.

The plans are those of any language model, so admission, deadlines and replay are the same: a row decodes once, and its
result is a vector. Prompts may come in chunks; the model computes a prompt with its last chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from inflight.checkpoint import ModelFolder
from inflight.contract import CacheSize, ModelFacts, ShardJob, ShardOffer, StepPlan, StepResult
from inflight.device import Device
from inflight.errors import StartError
from inflight.models import TextEncoder
from inflight.shard.input_batch import InputBatch
from inflight.shard.plan_checks import checked_plan


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
        self._model = model = TextEncoder(job.model, device, folder)
        if progress is not None:
            progress(1.0)
        longest = min(model.longest, job.max_model_len or model.longest)
        self._batch = InputBatch(job.max_rows, job.model.block_size)
        self._step = 0
        model.encode(np.zeros(2, np.int64))
        # Nothing is cached: the number of blocks only limits the tokens that the scheduler runs at once.
        blocks = -(-(longest + 1) * job.max_rows // job.model.block_size)
        facts = ModelFacts("encoder", model.dtype, model.vocab_size, model.weight_bytes)
        cache = CacheSize(blocks, job.model.block_size)
        self.offer = ShardOffer(facts, cache, job.max_rows, longest + 1, device.type, model.size)

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
        vectors: dict[int, bytes] = {}
        for row in step.sampled:
            text = batch.tokens[row, : batch.known[row]].astype(np.int64)
            vectors[batch.ids[row]] = self._model.encode(text, batch.sampling[row].pooled_from).tobytes()
        tokens = np.zeros(len(step.sampled), np.int64)
        ids = [batch.ids[row] for row in step.sampled]
        batch.append(step.sampled, tokens)
        seconds = time.perf_counter() - began
        return StepResult(plan.step, ids, tokens.tolist(), seconds=seconds, embeddings=vectors, failed=failed)
