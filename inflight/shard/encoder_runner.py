"""Encoder checkpoints (BERT and its kind): a plan's prompts in, one vector each out. No cache, no sampling.

The plans are those of any language model, so admission, deadlines and replay are too: a row "decodes" once, and what it
gives then is its vector. Prompts may come in chunks; the model computes when the last one is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from inflight.checkpoint import ModelFolder
from inflight.contract import ShardJob, ShardOffer, StepPlan, StepResult
from inflight.device import Device
from inflight.errors import StartError
from inflight.models import TextEncoder
from inflight.shard.input_batch import InputBatch
from inflight.shard.plan_checks import sound_plan


class EncoderRunner:
    """As `ModelRunner`, for models whose texts are computed whole. One rank only.

    Attributes:
        offer: what it holds.
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
            folder: the job's model, where it is open already.

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
        # Nothing is cached: blocks are only the scheduler's measure of how much runs at once.
        blocks = -(-(longest + 1) * job.max_rows // job.model.block_size)
        self.offer = ShardOffer(
            num_blocks=blocks,
            block_size=job.model.block_size,
            max_rows=job.max_rows,
            max_model_len=longest + 1,
            vocab_size=model.vocab_size,
            device_type=device.type,
            dtype=model.dtype,
            weight_bytes=model.weight_bytes,
            cache_bytes=0,
            family="encoder",
            embedding_size=model.size,
        )

    def run(self, plan: StepPlan) -> StepResult:
        """One step."""
        began = time.perf_counter()
        assert plan.step == self._step, f"plan {plan.step} came, {self._step} was next"
        self._step += 1
        plan, failed = sound_plan(plan, self._model.vocab_size)
        batch = self._batch
        chunks = batch.apply(plan)
        if not batch.ids:
            return StepResult(plan.step, [], [], seconds=time.perf_counter() - began)
        step = batch.step(chunks, plan.hold)
        found: dict[int, bytes] = {}
        for row in step.sampled:
            text = batch.tokens[row, : batch.known[row]].astype(np.int64)
            found[batch.ids[row]] = self._model.encode(text, batch.sampling[row].pooled_from).tobytes()
        tokens = np.zeros(len(step.sampled), np.int64)
        ids = [batch.ids[row] for row in step.sampled]
        batch.append(step.sampled, tokens)
        seconds = time.perf_counter() - began
        return StepResult(plan.step, ids, tokens.tolist(), seconds=seconds, embeddings=found, failed=failed)
