"""One rank of a language model: loads its share, runs plans."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inflight.checkpoint import ModelFolder, SentenceModel, open_model
from inflight.config import AdapterConfig, ModelConfig, processors
from inflight.contract import (
    Array,
    CacheSize,
    Draft,
    ModelFacts,
    ShardJob,
    ShardOffer,
    StateSize,
    StepPlan,
    StepResult,
    Transfer,
    Transferred,
    Watermark,
)
from inflight.device import Device, Ranks
from inflight.errors import StartError
from inflight.kernels import Sampled
from inflight.models import (
    Adapter,
    CausalLM,
    DecodeRows,
    ForwardBatch,
    ModelArray,
    VectorHead,
    decoder_scores,
    load_model,
)
from inflight.shard.cache_size import CPU_SHARE, SHARE, count_blocks, count_spare, count_states
from inflight.shard.draft_model import DraftModel, Guessed
from inflight.shard.input_batch import InputBatch, Scored
from inflight.shard.page_desk import Opening
from inflight.shard.plan_checks import Images, checked_plan
from inflight.shard.pooling import MeanPool
from inflight.shard.sampler import RowState, Sampler

WARM_TOKENS = 32
"""Tokens of the first step on a CPU, which only has to load every kernel once."""


class ModelRunner:
    """Runs the plans of one model on one rank. Not thread-safe; one caller at a time.

    Attributes:
        offer: its capacity.
    """

    def __init__(
        self,
        job: ShardJob,
        ranks: Ranks,
        device: Device,
        progress: Callable[[float], None] | None = None,
        folder: ModelFolder | None = None,
    ) -> None:
        """Loads the model and makes the cache.

        Args:
            folder: the job's model, if it is open already.

        Raises:
            StartError: a file is missing or broken, or the memory does not suffice.
        """
        folder = folder or open_model(job.model.model_dir, job.model.mmproj)
        if job.model.pooling not in (None, "last", "mean"):
            raise StartError(f"--pooling {job.model.pooling} is for encoders; of a decoder's it is last or mean")
        self._ranks = ranks
        self._device = device
        opening = Opening(job, folder)
        self._model = model = load_model(job.model, ranks, device, progress, folder)
        self._draft = DraftModel.load(job.model, model, folder, ranks, device)
        watermark = Watermark(job.model.watermark_gamma, job.model.watermark_delta)
        self._sampler = _sampler_of(model, job.model, watermark)
        _trim()
        longest = min(job.max_model_len or model.max_positions, model.max_positions)
        states, self._spare = self._make_states(job, longest)
        cache = self._make_cache(job, longest, (states.slots + len(self._spare or ())) * states.bytes)
        self._batch = InputBatch(job.max_rows, cache.block_size, model.switch, model.stretched)
        self._step = 0
        self._leaving: list[int] = []  # adapters that go when no row wears them
        self._means = MeanPool()
        warm = min(WARM_TOKENS, longest - 1) if device.type == "cpu" else min(job.max_step_tokens, longest)
        self._warm_up(warm, cache.block_size)
        sentences = folder.sentences or SentenceModel()
        width = model.hidden.shape[-1] if model.hidden is not None else 0
        self._head = VectorHead(sentences.layers if width else (), width, job.model.allow_pickle)
        self._scores = decoder_scores(folder, width, model.vocab_size, job.model.allow_pickle) if width else None
        size = self._scores.size if self._scores is not None else self._head.size
        kept = model.kept() if job.model.prompt_cache is not None else None
        self._desk, pages = opening.desk(kept, model.dtype)
        limits = job.max_rows, longest, device.type
        drafting = 0 if self._draft is None else min(self._draft.longest, longest)
        told = model.adapters, opening.contents, drafting
        self.offer = ShardOffer(self._facts, cache, *limits, size, states, pages, *told)

    @property
    def _facts(self) -> ModelFacts:
        """Those of the model, which guesses nothing where there is no memory for the states behind guesses."""
        facts = self._model.facts
        return facts if self._spare is None or len(self._spare) else facts.without_drafts()

    def _make_states(self, job: ShardJob, longest: int) -> tuple[StateSize, Sequence[int] | None]:
        """Makes memory for recurrent states, where the model has recurrent layers.

        Returns:
            Their number, and further slots for the states behind guessed tokens; None: the model has no states.

        Raises:
            StartError: the memory does not suffice.
        """
        model, size = self._model, job.model.block_size
        if not model.state_bytes:
            return StateSize(), None
        room = job.model.kv_cache_bytes or int(self._device.available_memory() * CPU_SHARE) // job.replicas
        spare = count_spare(model.state_bytes, room) if model.drafts else 0
        room -= spare * model.state_bytes
        states = count_states(model.state_bytes, model.block_bytes(size), size, room, job.max_rows, longest)
        model.make_states(states.slots + spare)
        return states, range(states.slots, states.slots + spare)

    def _make_cache(self, job: ShardJob, longest: int, taken: int = 0) -> CacheSize:
        """Makes the cache as large as the job and the memory allow.

        Args:
            taken: bytes of the memory that recurrent states have.

        Raises:
            StartError: the memory does not suffice.
        """
        on_cpu, block_size = self._device.type == "cpu", job.model.block_size
        if not on_cpu and job.model.kv_cache_bytes is None:
            self._largest_step(job, longest)
        draft = self._draft
        blocks = count_blocks(
            self._model.block_bytes(block_size) + (0 if draft is None else draft.block_bytes(block_size)),
            block_size,
            job.model.kv_cache_bytes,
            self._device.available_memory(),
            CPU_SHARE if on_cpu else SHARE,
            longest * job.max_rows,
            job.num_blocks,
            ranks_here=self._ranks.size * job.replicas if on_cpu else 1,
            taken=taken,
        )
        size = self._model.make_cache(blocks, block_size)
        return CacheSize(blocks, block_size, size + (0 if draft is None else draft.make_cache(blocks, block_size)))

    def run(self, plan: StepPlan) -> StepResult | None:
        """Runs one step; returns the result on rank 0, None on the others."""
        began = time.perf_counter()
        assert plan.step == self._step, f"plan {plan.step} came, {self._step} was next"
        self._step += 1
        failed: dict[int, str] = {}
        if plan.prefill:
            model = self._model
            images = Images(model.image_width, model.image_layers)
            plan, failed = checked_plan(plan, model.vocab_size, images, model.adapters)
        for admission in plan.prefill:
            if admission.restore is not None:
                self._model.copy_state(admission.restore, admission.state)
        chunks = self._batch.apply(plan)
        if self._draft is not None:
            self._draft.follow(plan)
        if self._leaving:
            self._let_go()
        guesses = self._within(self._batch.guessed(plan.drafts)) if plan.drafts else {}
        if self._draft is None or not any(draft.model for draft in plan.drafts):
            return self._computed(plan, chunks, guesses, failed, began)
        asked = time.perf_counter()
        modelled = self._modelled(plan.drafts, guesses)
        drafting = time.perf_counter() - asked
        result = self._computed(plan, chunks, {**guesses, **modelled.counts}, failed, began)
        ids = [self._batch.ids[row] for row in modelled.counts]
        return None if result is None else result.guessed(ids, drafting, modelled.caught_up)

    def _modelled(self, drafts: Sequence[Draft], guesses: Mapping[int, int]) -> Guessed:
        """The guesses of the draft model for rows that have no other."""
        assert self._draft is not None
        rows = {self._batch.row(draft.id): draft.model for draft in drafts if draft.model}
        rows = self._within({row: most for row, most in rows.items() if row not in guesses}, sum(guesses.values()))
        return self._draft.guess(self._batch, rows, self._choose)

    def _within(self, guesses: dict[int, int], taken: int = 0) -> dict[int, int]:
        """As many of these guesses as there is room for the states behind them. Args: taken: by other guesses."""
        if self._spare is None:
            return guesses
        left, kept = len(self._spare) - taken, dict[int, int]()
        for row, count in guesses.items():
            if count := min(count, left):
                kept[row] = count
                left -= count
        return kept

    def _choose(self, logits: ModelArray, rows: Sequence[int], place: int, best: Array | None) -> Array:
        """Samples from a draft model's logits as these rows do, behind so many guesses (`Choose`)."""
        batch = self._batch
        sampling = [batch.sampling[row] for row in rows]
        if best is not None and all(each.greedy for each in sampling):
            return np.maximum(best, 0)

        def state(index: int) -> RowState:
            row = rows[index]
            return RowState(batch.tokens[row, : batch.known[row] + place], int(batch.prompt[row]))

        columns = logits.shape[1]
        return self._sampler.sample(logits, [each.guessing(columns) for each in sampling], state, None, best).tokens

    def _computed(
        self, plan: StepPlan, chunks: dict[int, int], guesses: dict[int, int], failed: dict[int, str], began: float
    ) -> StepResult | None:
        """Computes the tokens of a step, whose rows, chunks and guesses are in the batch."""
        if not self._batch.ids:
            return None if self._ranks.rank else StepResult(plan.step, [], [], seconds=time.perf_counter() - began)
        if self._batch.decoding and not (chunks or guesses or plan.hold or plan.saves) and self._ranks.size == 1:
            rows = self._batch.decode_rows
            greedy = rows.greedy and not plan.masks
            logits = self._model.decode(rows, greedy)
            if logits is not None:
                return self._decoded(plan, rows, logits, greedy, began)
        return self._forward(plan, chunks, guesses, failed, began)

    def transfer(self, order: Transfer, answer: Callable[[Transferred], None]) -> None:
        """Begins to copy between the cache and files. Args: answer: called on another thread when it is done."""
        assert self._desk is not None, "an order came for files that were not offered"
        if self._draft is not None:
            self._draft.read(order)
        self._desk.take(order, answer)

    def close(self, seconds: float) -> None:
        """Ends what still writes files, after `seconds` at most."""
        if self._desk is not None:
            self._desk.close(seconds)

    def read_adapter(self, adapter: AdapterConfig) -> Any:
        """What `add_adapter` takes. May be called on any thread, also during `run`.

        Raises:
            StartError: it cannot be read, or is another model's.
        """
        return self._model.read_adapter(Adapter(adapter.name, adapter.folder))

    def add_adapter(self, number: int, factors: Any) -> None:
        """Makes an adapter known to the plans that follow."""
        self._leaving = [each for each in self._leaving if each != number]
        self._model.add_adapter(number, factors)

    def drop_adapter(self, number: int) -> None:
        """Forgets an adapter, once the rows that wear it have left."""
        self._leaving.append(number)
        self._let_go()

    def _let_go(self) -> None:
        worn = self._batch.adapters[: len(self._batch)].tolist()
        for number in self._leaving:
            if number not in worn:
                self._model.drop_adapter(number)
        self._leaving = [number for number in self._leaving if number in worn]

    @property
    def ids(self) -> list[int]:
        """Rows of the batch."""
        return list(self._batch.ids)

    def known_tokens(self, id: int) -> list[int]:
        """All known tokens of a row."""
        row = self._batch.row(id)
        tokens: list[int] = self._batch.tokens[row, : self._batch.known[row]].tolist()
        return tokens

    def known_from(self, id: int, first: int) -> list[int]:
        """The known tokens of a row from this position on; after `run` with those that it sampled, on every rank."""
        row = self._batch.row(id)
        tokens: list[int] = self._batch.tokens[row, first : self._batch.known[row]].tolist()
        return tokens

    def _decoded(self, plan: StepPlan, rows: DecodeRows, logits: ModelArray, greedy: bool, began: float) -> StepResult:
        """The result of a step in which every row decoded in the batch's own arrays. Most steps are of this kind."""
        best = self._model.best
        if greedy and best is not None:
            tokens: list[int] = best.tolist()
            unsound: list[int] = []
            if min(tokens) < 0:
                unsound = [id for id, token in zip(rows.ids, tokens) if token < 0]
                tokens = [max(0, token) for token in tokens]
            return StepResult(plan.step, rows.ids, tokens, seconds=time.perf_counter() - began, unsound=unsound)
        sampled = list(range(len(rows.ids)))
        return self._answer(plan, logits, sampled, [1] * len(sampled), [], {}, began)

    def _forward(
        self,
        plan: StepPlan,
        chunks: dict[int, int],
        guesses: dict[int, int],
        failed: dict[int, str],
        began: float,
    ) -> StepResult | None:
        step = self._batch.step(chunks, plan.hold, plan.saves, guesses, self._spare or ())
        logits = self._model.forward(step.batch)
        if self._ranks.rank:
            self._append(step.sampled, step.places, self._shared(np.zeros(sum(step.places), np.int64)))
            return None
        return self._answer(plan, logits, step.sampled, step.places, step.scored, failed, began)

    def _answer(
        self,
        plan: StepPlan,
        logits: ModelArray,
        sampled: list[int],
        places: list[int],
        scored: list[Scored],
        failed: dict[int, str],
        began: float,
    ) -> StepResult:
        """Samples the rows `sampled` from the last logits, each at its number of `places`; the first logits are those
        of the `scored` chunks."""
        batch, count = self._batch, sum(places)
        (scores, tops), embeddings = self._score(scored, logits), self._embed(sampled, places, scored, logits)
        last = logits if len(logits) == count else logits[len(logits) - count :]
        rows = sampled if count == len(sampled) else np.repeat(sampled, places).tolist()
        chosen = self._sample(rows, last, plan.masks)
        self._shared(chosen.tokens)
        kept = self._append(sampled, places, chosen.tokens)
        ids = [batch.ids[rows[place]] for place in kept]
        return StepResult(
            plan.step,
            ids,
            chosen.tokens[kept].tolist() if len(kept) < count else chosen.tokens.tolist(),
            None if chosen.logprobs is None else chosen.logprobs[kept].tolist(),
            {index: chosen.top[place] for index, place in enumerate(kept) if chosen.top[place]},
            scores,
            time.perf_counter() - began,
            embeddings,
            failed,
            [ids[index] for index, place in enumerate(kept) if place in chosen.unsound] if chosen.unsound else [],
            tops,
            {batch.ids[row]: number - 1 for row, number in zip(sampled, places) if number > 1} if plan.drafts else {},
        )

    def _append(self, sampled: list[int], places: list[int], tokens: Array) -> Sequence[int]:
        """Appends what was sampled at all places to the rows; returns the places whose tokens were."""
        if len(tokens) > len(sampled):
            kept = self._batch.accept(sampled, places, tokens)
            for source, to in self._batch.restores:
                self._model.copy_state(source, to)
            return kept
        self._batch.append(sampled, tokens)
        return range(len(tokens))

    def _shared(self, tokens: Array) -> Array:
        """Rank 0's tokens, broadcast to every rank."""
        if self._ranks.size == 1 or not len(tokens):
            return tokens
        import torch  # only several ranks need it, and they have it

        shared: Array = self._ranks.broadcast(torch.from_numpy(tokens).to(self._device.torch)).cpu().numpy()
        return shared

    def _sample(self, rows: list[int], logits: ModelArray, masks: Sequence[tuple[int, bytes]]) -> Sampled:
        """Samples once for each of `rows`, which names a row for each of its places, one behind the other."""
        batch = self._batch

        def state(place: int) -> RowState:
            row, first = rows[place], place
            while first and rows[first - 1] == row:
                first -= 1
            # Behind the known tokens lie the guessed ones.
            return RowState(batch.tokens[row, : batch.known[row] + place - first], int(batch.prompt[row]))

        places: dict[int, bytes] = {}
        if masks:
            first = {batch.ids[row]: place for place, row in reversed(list(enumerate(rows)))}
            for id, mask in masks:
                if id in first and first[id] < len(rows) and batch.ids[rows[first[id]]] == id:
                    places[first[id]] = mask
                    first[id] += 1
        best = self._model.best
        if best is not None:
            best = best[len(best) - len(rows) :]
        return self._sampler.sample(logits, [batch.sampling[row] for row in rows], state, places, best)

    def _score(
        self, scored: list[Scored], logits: ModelArray
    ) -> tuple[dict[int, list[float]], dict[int, list[list[tuple[int, float]]]]]:
        """See `StepResult.prompt_logprobs` and `prompt_top`."""
        scores: dict[int, list[float]] = {}
        tops: dict[int, list[list[tuple[int, float]]]] = {}
        start = 0
        for row, first, size in scored:
            sampling, id = self._batch.sampling[row], self._batch.ids[row]
            if not sampling.prompt_logprobs:
                start += size
                continue
            last = min(first + size, int(self._batch.prompt[row]) - 1)
            count = max(0, last - first)
            following = self._batch.tokens[row, first + 1 : first + 1 + count]
            part = logits[start : start + count]
            scores[id] = self._sampler.prompt_logprobs(part, following) if count else []
            if sampling.prompt_top and count:
                tops[id] = self._sampler.prompt_top(part, sampling.prompt_top)
            start += size
        return scores, tops

    def _embed(
        self, sampled: list[int], counts: list[int], scored: list[Scored], logits: ModelArray
    ) -> dict[int, bytes]:
        """Vectors or scores of the rows that asked for them and have their prompt computed now."""
        batch, hidden = self._batch, self._model.hidden
        wanted = [row for row in sampled if batch.sampling[row].pooling]
        if hidden is None or not (wanted or scored):
            return {}
        start = 0
        for row, first, size in scored:
            if batch.sampling[row].pooling:
                if not first:
                    self._means.begin(batch.ids[row])
                self._means.add(batch.ids[row], self._sampler.on_host(hidden[start : start + size]))
            start += size
        vectors: dict[int, bytes] = {}
        place = hidden.shape[0] - sum(counts) - 1
        for row, count in zip(sampled, counts):
            place += count
            if batch.known[row] != batch.prompt[row] or not batch.sampling[row].pooling:
                continue
            id = batch.ids[row]
            if self._scores is not None:
                found = logits[place - hidden.shape[0]]
                vectors[id] = self._scores(*map(self._sampler.on_host, (hidden[place], found))).tobytes()
                continue
            mean = batch.sampling[row].pooling == "mean"
            vector = self._means.take(id) if mean else self._sampler.on_host(hidden[place])
            vectors[id] = self._head(vector).tobytes()
        return vectors

    def _warm_up(self, tokens: int, block_size: int) -> None:
        """Runs a prompt and a decoding step, so that the first request finds all code and memory loaded."""
        for model in (self._model, *(() if self._draft is None else (self._draft.model,))):
            for lengths in ([max(1, tokens)], [1, 1]):
                model.forward(_dummy(lengths, block_size))

    def _largest_step(self, job: ShardJob, longest: int) -> None:
        """Runs a step of the largest size over a small cache: memory is measured with its buffers allocated."""
        lengths = [min(longest, job.max_step_tokens)]
        blocks = -(-lengths[0] // job.model.block_size)
        self._model.make_cache(blocks, job.model.block_size)
        self._model.forward(_dummy(lengths, job.model.block_size))


def _trim() -> None:
    """Returns memory that loading has freed to the system. glibc would keep some 80 MB of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _dummy(lengths: list[int], block_size: int) -> ForwardBatch:
    """Rows that write to the first blocks of an unused cache. They share the blocks: only the shapes matter."""
    total = sum(lengths)
    blocks = -(-max(lengths) // block_size)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return ForwardBatch(
        token_ids=np.zeros(total, np.int64),
        positions=positions,
        slots=positions,
        query_lens=lengths,
        context_lens=lengths,
        block_tables=np.tile(np.arange(blocks, dtype=np.int32), (len(lengths), 1)),
        block_size=block_size,
        num_decode=sum(length == 1 for length in lengths) if lengths[0] == 1 else 0,
        logits_at=np.cumsum(lengths) - 1,
        states=np.arange(len(lengths)),
    )


def _sampler_of(model: CausalLM, settings: ModelConfig, watermark: Watermark) -> Sampler:
    """The sampler for a model's kind of logits."""
    if model.on_torch:
        from inflight.shard.torch_sampler import TorchSampler

        return TorchSampler(watermark)
    from inflight.shard.native_sampler import NativeSampler

    return NativeSampler(settings.threads or processors(), watermark, settings.cpu_isa)
