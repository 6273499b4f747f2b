"""The generation engine's interface: starts and stops a model, answers the requests of the doors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from inflight.admission import Admission, holder
from inflight.config import GeneratorConfig, RestartPolicy
from inflight.contract import (
    Chat,
    Event,
    Finish,
    GenerationLimits,
    GenerationRequest,
    GeneratorInfo,
    PieceOfText,
    SamplingDefaults,
    ShardOffer,
    Start,
    Vision,
    together,
)
from inflight.engine.adapters import Adapters
from inflight.engine.capacity import Room, resolve
from inflight.engine.checks import token_ids
from inflight.engine.executor import Executor
from inflight.engine.grammars import Grammars
from inflight.engine.intake import Intake
from inflight.engine.lane import Lane
from inflight.engine.lanes import RENEW_GRACE, Lanes
from inflight.engine.replicas import Replicas
from inflight.engine.stream import Stream
from inflight.engine.streams import Streams
from inflight.errors import (
    DeadlineExceeded,
    Forbidden,
    InflightError,
    Overloaded,
    StartError,
    TemplateError,
    Unavailable,
)
from inflight.metrics import Load, Metrics, PromptsShown, ReplicaLoad, TextKind, TextTimes
from inflight.sched import Capacity, Sequence
from inflight.text import Tokenizer, shown

log = logging.getLogger("inflight")

NO_DRAFTS = (
    "guesses are checked exactly on the CPU engine only, and recurrent states need memory for those behind guesses: "
    "raise --kv-cache-memory"
)

ENCODER = "encoder"
"""Family of models that only embed."""


class Engine:
    """Serves one language model; implements `inflight.contract.Generator`. Lives on one event loop.

    Args:
        config: the model, limits, policies.
        tokenizer: of the model.
        executors: the shards, one executor for each replica.
        restart: delays before lost shards are started again.
        metrics: where generations are counted.
        vision: encodes the images of prompts; started and stopped with the engine. None: the model reads text only.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: Tokenizer,
        executors: Executor | Items[Executor],
        restart: RestartPolicy = RestartPolicy(),
        metrics: Metrics | None = None,
        vision: Vision | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._executors = (executors,) if isinstance(executors, Executor) else tuple(executors)
        self._restart = restart
        self._metrics = metrics
        self._base = config.base
        self.admission = Admission(config.policy.max_concurrent_requests, self._turned_away)
        self._grammars = Grammars(tokenizer)
        self._vision = vision
        self._streams = Streams(tokenizer, self.admission)
        self._adapters = Adapters(
            config.model.adapters, (config.name, config.model_id or str(config.model.model_dir)), self._streams
        )
        self._intake = Intake(config, tokenizer, self.admission, self._grammars, vision, self._adapters)
        self._lanes = Lanes(self._streams)  # filled at the first start, when the shards have said what they can hold
        self._rooms: dict[int, Room] = {}  # of every replica
        self._replicas = Replicas(
            config,
            self._executors,
            self._lanes,
            self._streams,
            restart,
            self._lane,
            self._forget,
            lambda: self._stopping,
        )
        self._arriving = 0
        self._looking: dict[int, asyncio.Task[None]] = {}  # requests whose images are encoded after all
        self._stopping = False
        self._info = GeneratorInfo(
            config.name,
            config.model_id or str(config.model.model_dir),
            GenerationLimits(),
            commit=config.commit,
            compute_type=config.compute_type,
            image_placeholder=vision.input.placeholder if vision is not None else None,
            vision=config.vision,
        )

    @property
    def info(self) -> GeneratorInfo:
        return self._info

    @property
    def ready(self) -> bool:
        return self._lanes.up and not self._stopping

    @property
    def replicas(self) -> Items[bool]:
        """Whether each replica is ready."""
        ready = [lane.up and not self._stopping for lane in self._lanes.all]
        return [*ready, *[False] * self._replicas.coming] or [False] * self._config.least

    @property
    def replica_loads(self) -> Items[ReplicaLoad]:
        """The loads of replicas; empty with one replica, whose load is the engine's."""
        lanes = self._lanes.all
        return [lane.shown(self._config.name) for lane in lanes] if len(self._executors) > 1 else []

    @property
    def prompts(self) -> Items[PromptsShown]:
        """The prompt caches and the recurrent states of replicas."""
        return [lane.prompts(self._config.name) for lane in self._lanes.all]

    @property
    def streams(self) -> int:
        """Requests that are not answered yet, those whose prompts are being encoded included."""
        return self._arriving + len(self._streams)

    @property
    def running(self) -> int:
        """Requests that have a row in the batch."""
        return self._lanes.running

    @property
    def waiting(self) -> int:
        """Requests that wait for their images or for a row."""
        return self._intake.images.waiting + self._lanes.waiting

    @property
    def load(self) -> Load:
        """Requests and cache tokens in use now, for the metrics."""
        loads = [lane.load for lane in self._lanes.all]
        return Load(self.running, self.waiting, sum(load.tokens for load in loads), sum(load.room for load in loads))

    # Life

    async def start(self) -> None:
        """Loads the shards and what encodes images, both at the same time, and begins to answer.

        Raises:
            StartError: with the shards' own text, or that of the worker of images.
        """
        try:
            offers = await self._loaded()
            # Before there is a lane: a configuration that asks for more than there is, is refused at the first start.
            lanes = [self._lane(number, offer) for number, offer in offers.items()]
        except BaseException as error:
            await self._replicas.stop()
            if self._vision is not None:
                await self._vision.stop()
            if isinstance(error, InflightError):  # of a start that is cancelled the caller gives the shards up
                await self._give_up()
            raise
        self._lanes.all = lanes
        for lane in lanes:
            lane.begin()
        self._replicas.begin()

    async def _loaded(self) -> dict[int, ShardOffer]:
        """The offers of the replicas that are loaded, by number."""
        loaded: list[Coroutine[Any, Any, dict[int, ShardOffer] | None]] = [self._replicas.load()]
        if self._vision is not None:
            loaded.append(self._vision.start())
        return (await together(loaded))[0] or {}

    def _lane(self, number: int, offer: ShardOffer) -> Lane:
        """A replica whose ranks are loaded. Raises StartError as `_learn`."""
        capacity = self._learn(number, offer)
        lane = Lane(
            self._config,
            number,
            self._executors[number],
            offer,
            capacity,
            self._streams,
            self._grammars,
            self._metrics,
            self._restart,
            learn=partial(self._learn, number),
            hand_over=self._lanes.hand_over,
            on_up=self._lanes.came_up,
        )
        lane.scheduler.on_unseen = self._unseen
        return lane

    async def restart_replicas(self, grace: float = RENEW_GRACE) -> None:
        """As `Lanes.renew`: new ranks for every replica, with the files that the model has now, and no request lost."""
        await self._lanes.renew(grace)

    async def load_adapter(self, name: str, folder: Path, *, again: bool = False) -> None:
        """Loads a LoRA adapter while the model serves. As `Adapters.load`."""
        if not self._lanes.all or self._stopping:
            raise Unavailable("the model is not loaded")
        try:
            await self._adapters.load(name, folder, self._executors, again=again)
        finally:
            self._info = replace(self._info, adapters=self._adapters.names)

    async def unload_adapter(self, name: str) -> None:
        """Takes a LoRA adapter out of service. As `Adapters.unload`."""
        try:
            await self._adapters.unload(name, self._executors)
        finally:
            self._info = replace(self._info, adapters=self._adapters.names)

    async def _give_up(self) -> None:
        await asyncio.gather(*(executor.give_up() for executor in self._executors))

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish within `grace` seconds, ends the shards."""
        self._stopping = True
        streams = self._streams
        if streams and grace > 0:
            try:
                await asyncio.wait_for(streams.idle.wait(), grace)
            except asyncio.TimeoutError:
                log.warning("%d generations did not finish before the server stopped", len(streams))
        await self._replicas.stop()
        await asyncio.gather(*(lane.end() for lane in self._lanes.all))
        for stream in streams.all():
            stream.fail(Unavailable("the server stops"))
        self._intake.close()
        self._grammars.close()
        if self._vision is not None:
            await self._vision.stop()
        await self._give_up()

    def _forget(self, replica: int) -> None:
        """A replica has ended: what it could hold limits requests no more."""
        del self._rooms[replica]
        self._adapters.leave(replica)

    def _learn(self, replica: int, offer: ShardOffer) -> Capacity:
        """Sets `info` to what the shards of all replicas offer: the smallest cache limits a request, since any replica
        may have to take it over. After a restart shards may hold fewer tokens than before.

        Returns:
            What the scheduler may plan with.

        Raises:
            StartError: at the first start, the configuration asks for more than they can hold.
        """
        config, tokenizer = self._config, self._tokenizer
        if self._lanes.all:
            self._adapters.check(offer.adapters, self._executors)
        self._adapters.learn(replica, offer)
        room = resolve(config, offer, again=bool(self._lanes.all), reads_images=self._vision is not None)
        span, step = self._intake.images.step, room.capacity.max_prefill_tokens
        if span > step:
            raise StartError(
                f"max_batch_prefill_tokens {step} must be at least {span}: this model computes the {span} tokens of an "
                "image in one step"
            )
        self._rooms[replica] = room
        if config.policy.speculate and not offer.model.drafts and not self._lanes.all:
            log.warning("'%s' makes one token a step in spite of --speculate: %s", config.name, NO_DRAFTS)
        least = min(self._rooms.values(), key=lambda room: room.capacity.total_tokens)
        encodes = offer.model.family == ENCODER
        pooling = self._intake.pooling(encodes) if offer.embedding_size else None
        if pooling is not None and (encodes or pooling.kind != "embedding") and self._metrics is not None:
            self._metrics.generations.texts.serve()
        self._info = replace(
            self._info,
            limits=least.limits,
            policy=least.policy,
            device_type=offer.device_type,
            dtype=offer.model.dtype,
            world_size=config.tensor_parallel,
            vocab_size=offer.model.vocab_size,
            has_template=tokenizer.chat is not None,
            answer=tokenizer.answer_form(offer.model.vocab_size),
            embedding_size=offer.embedding_size,
            unit_vectors=self._intake.unit_vectors,
            pooling=pooling,
            generates=not encodes and (pooling is None or pooling.kind == "embedding"),
            adapters=self._adapters.names,
            defaults=tokenizer.defaults if config.generation_config == "auto" else SamplingDefaults(),
        )
        return room.capacity

    # Requests

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        began = time.perf_counter()
        start: Start | None = None
        finish: Finish | None = None
        failure: str | None = "dropped"  # the reader leaves before the last event
        stream: Stream | None = None
        timer: asyncio.TimerHandle | None = None
        caller = holder.get()
        if caller is not None:
            if not caller.allows(self.info.name, self.info.model_id, request.adapter, self._base or None):
                raise Forbidden(f"this API key may not call the model '{self.info.name}'")
            request = replace(request, tenant=caller.tenant, priority=caller.priority)
        try:
            if request.embed and self._metrics is not None:
                self._metrics.generations.texts.began(_kind(request))
            stream = await self._open(request)
            encoding = time.perf_counter() - began
            if request.timeout is not None:
                late = DeadlineExceeded(f"the generation took longer than its {request.timeout:g} seconds")
                left = max(0.0, request.timeout - (time.perf_counter() - began))
                timer = asyncio.get_running_loop().call_later(left, stream.fail, late)
            while finish is None:
                event = await stream.next()
                if type(event) is Start:
                    event = start = replace(event, encoding=encoding) if request.embed else event
                elif type(event) is Finish:
                    finish, failure = event, None
                yield event
        except InflightError as error:
            failure, error.counted = error.failure, True
            if request.embed and self._metrics is not None:
                self._metrics.generations.texts.refused(error.text_failure or "tokenization")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if stream is not None:
                self._streams.close(stream)
                self._adapters.settle(self._executors)
                if stream.sequence.id in self._looking:
                    self._looking[stream.sequence.id].cancel()
            if caller is not None and stream is not None:
                caller.spent(len(stream.sequence.tokens))
            skipped = stream.sequence.skipped if stream is not None else {}
            self._count(time.perf_counter() - began, start, finish, failure, request, skipped)

    def _count(
        self,
        seconds: float,
        start: Start | None,
        finish: Finish | None,
        failure: str | None,
        request: GenerationRequest,
        skipped: Mapping[int, int],
    ) -> None:
        """Counts an ended request in the metrics.

        Args:
            failure: the kind of error it ended with; None: it was answered.
            skipped: as in `LlmMetrics.done`.
        """
        if self._metrics is None:
            return
        length, generated = (finish.prompt_length, finish.generated) if finish is not None else (0, 0)
        queued, inference = (start.queued if start else 0.0), (finish.inference if finish else 0.0)
        self._metrics.generations.done(length, generated, queued, inference, seconds, failure, skipped)
        if request.embed and start is not None and failure is None:
            times = TextTimes(seconds, start.encoding, queued, inference)
            self._metrics.generations.texts.done(_kind(request), length, times)
        self._metrics.generated(self._base or self.info.name, seconds, queued, inference, failure is not None)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._tokenizer.pieces, text, add_special_tokens)

    async def decode(self, ids: Items[int]) -> str:
        ids = token_ids(ids)
        self._tokenizer.check(ids, self._info.vocab_size)
        return await asyncio.get_running_loop().run_in_executor(None, self._tokenizer.decode, ids, False)

    async def render(self, chat: Chat) -> str:
        template = self._tokenizer.chat
        if template is None:
            raise TemplateError("this model has no chat template; send a prompt to a route without chat instead")
        native = template.reads_tools(chat.template, self._info.answer.calls)
        return template.render(shown(chat, native), self._info.image_placeholder)

    async def _open(self, request: GenerationRequest) -> Stream:
        lanes = self._lanes
        if self._stopping:
            raise Unavailable("the server stops")
        if not lanes.all:
            raise Unavailable("the model is still being loaded; try again later")
        failing = lanes.failing
        if failing is not None:
            raise Unavailable(f"the model cannot be loaded now: {failing}")
        self.admission.enter()
        self._arriving += 1
        began = time.perf_counter()
        try:
            prompt = await self._intake.prompt(request, self._info, lanes)
            if prompt.media:
                request = replace(request, media=prompt.media)  # the files, should they be needed again
            follower = await self._intake.follower(request, self._info)
            if self._stopping:
                raise Unavailable("the server stops")
            sequence = self._intake.sequence(request, prompt, self._info, lanes)
        except BaseException:
            self.admission.leave()
            raise
        finally:
            self._arriving -= 1
        if self._metrics is not None:
            self._metrics.generations.admitted(time.perf_counter() - began, sequence.stop_at - sequence.num_prompt)
        return self._streams.open(request, sequence, follower, lanes.place(sequence))

    def _unseen(self, sequence: Sequence) -> None:
        """The keys of a request's images, which were not encoded for that, are gone."""
        if sequence.id not in self._looking:
            task = self._looking[sequence.id] = asyncio.ensure_future(self._look(sequence))
            task.add_done_callback(lambda _: self._looking.pop(sequence.id, None))

    async def _look(self, sequence: Sequence) -> None:
        stream = self._streams.get(sequence.id)
        try:
            if stream is not None:
                images = await self._intake.images.encode(stream.request)
                stream.home.restore(sequence, images)  # which may be another one by now
        except InflightError as error:
            self._streams.fail(sequence, error)

    def _turned_away(self) -> None:
        if self._metrics is not None:
            self._metrics.generations.done(0, 0, 0.0, 0.0, 0.0, Overloaded.failure)


def _kind(request: GenerationRequest) -> TextKind:
    return "predict" if request.pooled == "scores" else "embed"
