"""The generation engine: admits requests, keeps the shards busy, gives every caller its stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from inflight.admission import Admission
from inflight.config import GeneratorConfig, RestartPolicy
from inflight.engine.capacity import resolve
from inflight.engine.checks import failures, sayable, token_ids
from inflight.engine.embedding import Embedder
from inflight.engine.encoder import LONG, Encoder
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.grammars import Grammars
from inflight.engine.stream import Stream
from inflight.errors import (
    OVERLOADED,
    DeadlineExceeded,
    InflightError,
    InvalidRequest,
    ModelError,
    Overloaded,
    StartError,
    TemplateError,
    Unavailable,
    WorkerLost,
)
from inflight.generation import (
    Chat,
    Event,
    Finish,
    GenerationLimits,
    GenerationRequest,
    GeneratorInfo,
    PieceOfText,
    SamplingDefaults,
    Start,
)
from inflight.metrics import Load, Metrics
from inflight.plan import ShardOffer, StepPlan, StepResult
from inflight.sched import Capacity, Scheduler, Sequence
from inflight.sentences import read_sentence_model
from inflight.starting import KILLED_STARTS, killed_too_often
from inflight.text import Matcher, Tokenizer, shown

log = logging.getLogger("inflight")

FAILED_STARTS = 3
"""Restarts for which the shards say one after the other why they cannot load, before those who wait are told so; it is
tried again none the less. A rank that was killed while it loaded has said nothing, and does not count."""

KILLED_DELAY = 2.0
"""The longest pause in seconds before shards are started again that somebody killed."""

PATIENCE = 600.0
"""Seconds without shards after which requests without a deadline of their own are given up, and new ones refused."""

PULSE, PULSE_TIMEOUT = 10.0, 30.0
"""Seconds of idleness after which the shards are asked for a step without rows, and in which they must answer it: so
one that hangs is replaced before a request waits for it."""

ENCODER = "encoder"
"""Family of models that only embed."""

UNREAD = 1 << 17
"""Tokens of ended generations whose clients take them slowly; beyond, those who have taken longest lose the rest."""

LONGEST_TEXT = 16
"""Characters a token stands for at most, on average: longer texts are refused before they are encoded."""


@dataclass(frozen=True)
class _Flight:
    """A plan that is not answered yet.

    Attributes:
        starts: where chunks of prompts with log-probabilities begin, by row.
        method: `prefill` where it computes prompts, `pulse` where it computes nothing, else `decode`.
        submitted: when.
    """

    starts: dict[int, int]
    method: str
    submitted: float


class Engine:
    """A language model as the doors see it (`inflight.generation.Generator`). Lives on one event loop.

    Args:
        config: the model, limits, policies.
        tokenizer: of the model.
        executor: the shards.
        restart: when lost shards are started again.
        metrics: where generations are counted.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: Tokenizer,
        executor: Executor,
        restart: RestartPolicy = RestartPolicy(),
        metrics: Metrics | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._executor = executor
        self._restart = restart
        self._metrics = metrics
        self.admission = Admission(config.policy.max_concurrent_requests, self._turned_away)
        self._encoder = Encoder(tokenizer)
        sentences = read_sentence_model(config.model.model_dir)
        self._embedder = Embedder(sentences, tokenizer, config.pooling)
        self._unit_vectors = sentences is None or sentences.unit
        self._streams: dict[int, Stream] = {}
        # Those that have ended and whose readers are still at it, oldest first, with their tokens.
        self._unread: dict[int, tuple[Stream, int]] = {}
        self._unread_tokens = 0
        self._arriving = 0
        self._next_id = 0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop_task: asyncio.Task[None] | None = None
        self._stopping = False
        self._up = False
        self._failing: str | None = None
        self._num_blocks: int | None = None  # of the cache, once the first start has decided
        self._back_off = 0.0  # seconds until the next start; none where the last one has led to an answer
        self._scheduler: Scheduler | None = None
        self._grammars: Grammars | None = None
        self._flights: deque[_Flight] = deque()
        self._waiting_since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        executor.on_lost = self._wake.set
        self._aborting: asyncio.Task[None] | None = None
        self._info = GeneratorInfo(
            config.name,
            config.model_id or str(config.model.model_dir),
            GenerationLimits(),
            commit=config.commit,
            compute_type=config.compute_type,
        )

    # The generator

    @property
    def info(self) -> GeneratorInfo:
        return self._info

    @property
    def ready(self) -> bool:
        return self._up and not self._executor.lost and not self._stopping

    @property
    def streams(self) -> int:
        """Requests in the engine."""
        return len(self._streams) + self._arriving

    @property
    def running(self) -> int:
        """Rows of the batch."""
        return self._scheduler.running if self._scheduler is not None else 0

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return self._scheduler.waiting if self._scheduler is not None else 0

    @property
    def load(self) -> Load:
        """What it does now."""
        scheduler = self._scheduler
        if scheduler is None:
            return Load()
        size, pool = scheduler.capacity.block_size, scheduler.pool
        return Load(scheduler.running, scheduler.waiting, (pool.count - pool.free) * size, pool.count * size)

    async def start(self) -> None:
        """Loads the shards and begins to answer.

        Raises:
            StartError: with the shards' own text.
        """
        offer = await self._first_start()
        try:
            self._learn(offer)
        except InflightError:
            await self._executor.close()
            raise
        self._up = True
        self._loop_task = asyncio.ensure_future(self._run())

    async def _first_start(self) -> ShardOffer:
        """Shards that somebody killed while they loaded are started again, but not for ever: nothing has ever been
        ready here, and the system itself may kill what takes too much memory.

        Raises:
            StartError: with the shards' own text, or that they were killed each time.
        """
        failed, start = StartError("the server stops"), self._executor.first
        for _ in range(KILLED_STARTS):
            if self._stopping:
                raise failed
            try:
                return await start()
            except RanksKilled as error:
                failed = StartError(str(error))
            log.warning("the shards of '%s' were lost while they loaded: %s", self._config.name, failed)
            start = self._executor.start
            await asyncio.sleep(min(self._restart.first_delay, KILLED_DELAY))
        raise killed_too_often(failed)

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish within `grace` seconds, ends the shards."""
        self._stopping = True
        if self._streams and grace > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), grace)
            except asyncio.TimeoutError:
                log.warning("%d generations did not finish before the server stopped", len(self._streams))
        while self._loop_task is not None and not self._loop_task.done():
            self._loop_task.cancel()
            # Before Python 3.12 `wait_for` forgets a cancel that comes together with its result: it is said again.
            await asyncio.wait([self._loop_task], timeout=0.2)
        if self._watch is not None:
            self._watch.cancel()
        if self._aborting is not None:
            await self._aborting
        for stream in list(self._streams.values()):
            stream.fail(Unavailable("the server stops"))
        self._encoder.close()
        if self._grammars is not None:
            self._grammars.close()
        await self._executor.give_up()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        began = time.perf_counter()
        start: Start | None = None
        failure: str | None = "dropped"  # where nobody takes the events to their end
        finish: Finish | None = None
        events = self._events(request)
        try:
            async for event in events:
                if type(event) is Start:
                    start = event
                elif type(event) is Finish:
                    finish, failure = event, None
                yield event
        except InflightError as error:
            failure = error.failure
            raise
        finally:
            await events.aclose()
            if self._metrics is not None:
                length, generated = (finish.prompt_length, finish.generated) if finish is not None else (0, 0)
                queued, inference = (start.queued if start else 0.0), (finish.inference if finish else 0.0)
                self._metrics.generations.done(
                    length, generated, queued, inference, time.perf_counter() - began, failure
                )

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        stream = await self._open(request)
        timer = None
        if request.timeout is not None:
            error = DeadlineExceeded(f"the generation took longer than its {request.timeout:g} seconds")
            timer = asyncio.get_running_loop().call_later(request.timeout, stream.fail, error)
        try:
            while True:
                event = await stream.next()
                yield event
                if type(event) is Finish:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            self._close(stream)

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
        return template.render(shown(chat, template.format_of(chat.template)))

    # Requests in and out

    async def _open(self, request: GenerationRequest) -> Stream:
        if self._stopping:
            raise Unavailable("the server stops")
        if self._failing is not None:
            raise Unavailable(f"the model cannot be loaded now: {self._failing}")
        if self._scheduler is None:
            raise Unavailable("the model is still being loaded; try again later")
        self.admission.enter()
        self._arriving += 1
        began = time.perf_counter()
        try:
            prompt = await self._prompt(request)
            grammar = await self._grammar(request)
            if self._stopping:
                raise Unavailable("the server stops")
            sequence = self._sequence(request, prompt)
        except BaseException:
            self.admission.leave()
            raise
        finally:
            self._arriving -= 1
        if self._metrics is not None:
            self._metrics.generations.admitted(time.perf_counter() - began, sequence.stop_at - sequence.num_prompt)
        stream = Stream(request, sequence, self._tokenizer, self._ended)
        if grammar is not None:
            stream.matcher, sequence.mask = grammar
        self._streams[sequence.id] = stream
        self._idle.clear()
        self._scheduler.add(sequence)
        self._wake.set()
        return stream

    def _ended(self, stream: Stream) -> None:
        """Nothing more is computed for it; its reader may still have to take what is here."""
        self.admission.leave()
        size = stream.sequence.generated
        self._unread[stream.sequence.id] = stream, size
        self._unread_tokens += size
        while self._unread_tokens > UNREAD and len(self._unread) > 1:
            slowest, size = self._unread.pop(next(iter(self._unread)))
            self._unread_tokens -= size
            slowest.drop()

    def _turned_away(self) -> None:
        if self._metrics is not None:
            self._metrics.generations.done(0, 0, 0.0, 0.0, 0.0, Overloaded.failure)

    def _close(self, stream: Stream) -> None:
        """The caller has its end, or left: the row is freed in the next plan."""
        id = stream.sequence.id
        if self._streams.pop(id, None) is None:
            return
        stream.end()
        if id in self._unread:
            self._unread_tokens -= self._unread.pop(id)[1]
        if self._scheduler is not None:
            self._scheduler.finish(id)
        self._wake.set()
        if not self._streams:
            self._idle.set()

    async def _prompt(self, request: GenerationRequest) -> list[int]:
        """The prompt's tokens, checked and truncated."""
        limits = self._info.limits
        if isinstance(request.prompt, str):
            if request.embed:
                request = replace(request, prompt=self._embedder.text(request))
            most = limits.max_input_tokens * LONGEST_TEXT * 8
            if not self._cuts(request) and len(request.prompt) > most:
                raise InvalidRequest(
                    f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {len(request.prompt)} "
                    "characters"
                )
            tokens = await self._encoded(request)
        else:
            tokens = token_ids(request.prompt)
        if request.embed:
            tokens = self._embedder.cut(tokens, request, limits.max_input_tokens)
        elif request.truncate is not None:
            tokens = tokens[-request.truncate :]
        if not tokens:
            raise InvalidRequest("`inputs` cannot be empty")
        if len(tokens) > limits.max_input_tokens:
            raise InvalidRequest(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {len(tokens)}")
        self._tokenizer.check(tokens, self._info.vocab_size)
        return tokens

    def _cuts(self, request: GenerationRequest) -> bool:
        """Whether a prompt that is too long is cut instead of refused."""
        return self._embedder.cuts(request) if request.embed else request.truncate is not None

    async def _encoded(self, request: GenerationRequest) -> list[int]:
        """The tokens of a text."""
        assert isinstance(request.prompt, str)
        if len(request.prompt) > LONG and self._encoder.long > self.admission.limit // 4:
            raise Overloaded(OVERLOADED)  # long texts that wait for the tokenizer take no more places
        most = self._info.limits.max_input_tokens
        wanted = None if self._cuts(request) else most
        tokens, whole, seconds = await self._encoder.encode(request.prompt, request.add_special_tokens, wanted)
        if not whole or (wanted is not None and len(tokens) > wanted):
            self.admission.wasted(seconds)
        if not whole:
            raise InvalidRequest(f"`inputs` must have less than {most} tokens. Given: more than {len(tokens)}")
        return tokens

    async def _grammar(self, request: GenerationRequest) -> tuple[Matcher, bytes] | None:
        if request.grammar is None:
            return None
        if not self._config.limits.grammars:
            raise InvalidRequest("this server was started without support of grammars; leave it out")
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer, self._info.vocab_size)
        return await self._grammars.open(request.grammar)

    def _sequence(self, request: GenerationRequest, prompt: list[int]) -> Sequence:
        assert self._scheduler is not None
        total = self._info.limits.max_total_tokens
        new = 1 if request.embed else request.max_new_tokens
        if request.embed and not self._info.embedding_size:
            raise InvalidRequest("this model gives no embeddings")
        if not request.embed and not self._info.generates:
            raise InvalidRequest("this model embeds texts and writes none; use /v1/embeddings")
        if new is not None and (not isinstance(new, int) or new < 1):
            raise InvalidRequest(f"`max_new_tokens` must be a whole number of at least 1. Given: {new}")
        if new is None or (request.fit and len(prompt) + new > total):
            new = total - len(prompt)
        if len(prompt) + new > total:
            raise InvalidRequest(
                f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {len(prompt)} `inputs` tokens and "
                f"{new} `max_new_tokens`"
            )
        fault = request.sampling.fault(self._info.vocab_size)
        if fault is not None:
            raise InvalidRequest(fault)
        self._scheduler.check(len(prompt), new)
        self._next_id += 1
        sampling = request.sampling
        if request.embed:
            sampling = self._embedder.sampling(request)
        return Sequence(
            self._next_id,
            prompt,
            sampling,
            new,
            priority=request.priority,
            tenant=request.tenant,
            lockstep=request.grammar is not None,
            adapter=self._adapter(request.adapter),
        )

    def _adapter(self, name: str | None) -> int:
        if name is None:
            return 0
        names = self._info.adapters
        if name not in names:
            known = ", ".join(names) or "none"
            raise InvalidRequest(f"the adapter '{name}' is not served; served here: {known}")
        return names.index(name) + 1

    # The step loop

    async def _run(self) -> None:
        """Keeps plans in flight until it is cancelled; a loss of the shards starts them again."""
        while True:
            try:
                if not self._up:
                    await self._replace()
                await self._steps()
            except WorkerLost as error:
                log.warning("the shards of '%s' were lost: %s", self._config.name, error)
                await self._mourn(isinstance(error, RanksKilled))
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the step loop of '%s' failed", self._config.name)
                for stream in list(self._streams.values()):
                    stream.fail(ModelError("internal server error, the server's log has the details"))
                    self._close(stream)
                await self._executor.abort()
                await self._mourn()

    async def _steps(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        depth = self._config.policy.plans_in_flight
        while True:
            while scheduler.in_flight < depth and not self._executor.lost:
                plan = scheduler.plan()
                if plan is None:
                    break
                self._note(plan)
                self._executor.submit(plan)
            if not scheduler.in_flight and not self._executor.lost:
                self._wake.clear()  # by a request, or by a loss while nobody asks for anything
                pulse = asyncio.get_running_loop().call_later(PULSE, self._pulse)
                await self._wake.wait()
                pulse.cancel()
                # Requests that arrive together start together.
                await asyncio.sleep(0)
                continue
            self._waiting_since = time.monotonic()
            if self._watch is None:
                self._watch_after(self._config.policy.step_timeout)
            self._take(await self._executor.result())

    def _pulse(self) -> None:
        """Nobody has asked for anything for a while: do the shards still answer?"""
        assert self._scheduler is not None
        plan = self._scheduler.pulse()
        if plan is None or self._executor.lost:
            return
        flight = _Flight({}, "pulse", time.perf_counter())
        self._flights.append(flight)
        self._executor.submit(plan)
        timeout = min(PULSE_TIMEOUT, self._config.policy.step_timeout)
        asyncio.get_running_loop().call_later(timeout, self._missed, flight, timeout)
        self._wake.set()

    def _missed(self, flight: _Flight, timeout: float) -> None:
        if self._flights and self._flights[0] is flight and self._aborting is None:
            log.error("the idle shards of '%s' have not answered for %g seconds", self._config.name, timeout)
            self._aborting = asyncio.ensure_future(self._executor.abort())

    def _watch_after(self, seconds: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(seconds, self._watched)

    def _watched(self) -> None:
        """Gives the shards up where one step takes too long. One timer for many steps: a timer each would cost more."""
        self._watch = None
        if not self._flights or self._aborting is not None:
            return
        timeout = self._config.policy.step_timeout
        left = self._waiting_since + timeout - time.monotonic()
        if left > 0:
            self._watch_after(left)
            return
        log.error("a step of '%s' took longer than %g seconds", self._config.name, timeout)
        self._aborting = asyncio.ensure_future(self._executor.abort())  # whoever waits for the result learns of it

    def _note(self, plan: StepPlan) -> None:
        """What the host must remember of a plan until its answer comes."""
        starts: dict[int, int] = {}
        assert self._scheduler is not None
        for admission in plan.prefill:
            stream = self._streams.get(admission.id)
            if stream is not None:
                stream.begin()
                if stream.sequence.sampling.prompt_logprobs:
                    starts[admission.id] = stream.sequence.planned - admission.chunk
        joined = sum(admission.token_ids is not None for admission in plan.prefill)
        self._flights.append(_Flight(starts, "prefill" if plan.prefill else "decode", time.perf_counter()))
        if self._metrics is not None and joined:
            self._metrics.generations.planned(joined, self._scheduler.running)

    def _take(self, result: StepResult) -> None:
        assert self._scheduler is not None
        flight, began = self._flights.popleft(), time.perf_counter()
        self._back_off = 0.0
        starts = flight.starts
        for id, values in result.prompt_logprobs.items():
            stream = self._streams.get(id)
            if stream is not None and id in starts:
                stream.prompt_logprobs(starts[id] + 1, values)
        for id, error in failures(result):
            stream = self._streams.get(id)
            if stream is not None:
                stream.fail(error)
                self._close(stream)
        logprobs, tops = result.logprobs, result.top
        masked: list[tuple[Stream, Matcher, int]] = []
        for sequence, token, index in self._scheduler.apply(result):
            stream = self._streams.get(sequence.id)
            if stream is None or stream.finished:
                self._scheduler.finish(sequence.id)
                continue
            logprob = logprobs[index] if logprobs is not None and sequence.sampling.logprobs else None
            stream.embedding = result.embeddings.get(sequence.id, stream.embedding)
            if stream.push(token, logprob, tops.get(sequence.id, ())):
                self._scheduler.finish(sequence.id)
            elif stream.matcher is not None:
                masked.append((stream, stream.matcher, token))
        if masked:
            self._mask(masked)
        if self._metrics is not None and flight.method != "pulse":
            host = time.perf_counter() - began
            self._metrics.generations.step(flight.method, began - flight.submitted, result.seconds, host)

    def _mask(self, masked: list[tuple[Stream, Matcher, int]]) -> None:
        """Rows that follow a grammar go on together, once it is known what may follow their tokens."""

        def done(masks: list[bytes | InflightError]) -> None:
            for (stream, _, _), mask in zip(masked, masks):
                if isinstance(mask, InflightError):
                    stream.fail(mask)
                    self._close(stream)
                else:
                    stream.sequence.mask = mask
            self._wake.set()

        assert self._grammars is not None
        self._grammars.advance([(matcher, token) for _, matcher, token in masked], done)

    async def _mourn(self, killed: bool = False) -> None:
        """The shards are gone, and what they had in flight: who was computed waits again, who is guilty fails."""
        assert self._scheduler is not None
        self._up = False
        self._back_off = min(self._back_off, KILLED_DELAY) if killed else self._back_off
        if self._aborting is not None:
            await self._aborting
            self._aborting = None
        for flight in self._flights:
            if self._metrics is not None and flight.method != "pulse":
                self._metrics.generations.step_lost(flight.method)
        self._flights.clear()
        for sequence in self._scheduler.lost(killed):
            self._fail(
                sequence,
                WorkerLost("the model's worker died whenever it computed this request; it is not tried again"),
            )

    async def _replace(self) -> None:
        """Starts the shards anew, as often as it takes; whoever was running goes on from its known tokens.

        At once where the last ones have answered anything, else with back-off. Who waits for them does so until its own
        deadline, or for `PATIENCE` where it has none; sooner it is told only what the shards say of themselves.
        """
        refusals = 0
        patience = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)
        try:
            while True:
                await asyncio.sleep(self._back_off)
                self._back_off = min(max(self._back_off * 2, self._restart.first_delay), self._restart.max_delay)
                try:
                    self._learn(await self._executor.start(self._num_blocks))
                except RanksKilled as error:
                    log.warning("the shards of '%s' were lost while they loaded: %s", self._config.name, error)
                    self._back_off = min(self._back_off, KILLED_DELAY)
                except InflightError as error:
                    refusals += 1
                    log.error("the shards of '%s' cannot start: %s", self._config.name, error)
                    if refusals >= FAILED_STARTS:
                        self._refuse(str(error), list(self._streams.values()))
                else:
                    self._failing = None
                    self._up = True
                    return
        finally:
            patience.cancel()

    def _give_up(self) -> None:
        """The shards do not come back."""
        waiting = [stream for stream in self._streams.values() if stream.request.timeout is None]
        self._refuse(f"its worker has not come back within {PATIENCE:g} seconds", waiting)

    def _refuse(self, why: str, streams: Items[Stream]) -> None:
        """Fails these streams, and new requests until the shards are there again."""
        self._failing = why
        for stream in streams:
            stream.fail(Unavailable(f"the model cannot be loaded now: {why}"))

    def _fail(self, sequence: Sequence, error: InflightError) -> None:
        stream = self._streams.get(sequence.id)
        if stream is not None:
            stream.fail(error)

    def _learn(self, offer: ShardOffer) -> None:
        """Takes over what the shards can hold, which may be less after a restart than at the first start.

        Raises:
            StartError: the flags ask for more than that, at the first start.
        """
        config, tokenizer = self._config, self._tokenizer
        room = resolve(config, offer, again=self._scheduler is not None)
        self._info = replace(
            self._info,
            limits=room.limits,
            policy=room.policy,
            device_type=offer.device_type,
            dtype=offer.dtype,
            world_size=config.tensor_parallel,
            vocab_size=offer.vocab_size,
            has_template=tokenizer.chat is not None,
            tool_format=sayable(tokenizer.tool_format(), offer.vocab_size),
            embedding_size=offer.embedding_size,
            unit_vectors=self._unit_vectors,
            generates=offer.family != ENCODER,
            adapters=tuple(adapter.name for adapter in config.model.adapters),
            defaults=tokenizer.defaults if config.generation_config == "auto" else SamplingDefaults(),
        )
        self._num_blocks = self._num_blocks or offer.num_blocks
        if self._scheduler is None:
            self._scheduler = Scheduler(room.capacity)
        elif room.capacity != self._scheduler.capacity:
            self._resize(room.capacity)

    def _resize(self, capacity: Capacity) -> None:
        """The cache is not as large as it was, because memory is short, or is so again."""
        assert self._scheduler is not None
        before, room = self._scheduler.capacity.total_tokens, capacity.total_tokens
        log.warning("the cache of '%s' holds %d tokens now instead of %d", self._config.name, room, before)
        for sequence in self._scheduler.resize(capacity):
            self._fail(
                sequence,
                Unavailable(
                    f"the model was started anew and memory has become short: its cache holds {room} tokens now, and "
                    f"this request may need {sequence.stop_at - 1}; ask for fewer, or free memory on the server"
                ),
            )
