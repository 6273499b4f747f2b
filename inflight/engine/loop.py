"""The step loop: sends plans to the shards, gives results to the streams, detects shards that hang or are lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from inflight.config import Policy
from inflight.contract import StepPlan, StepResult
from inflight.engine.checks import failures
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.grammars import Follower, Grammars, Next, Step
from inflight.engine.prompt_cache import PromptCache
from inflight.engine.recovery import Recovery
from inflight.engine.stream import Stream
from inflight.engine.streams import Streams
from inflight.errors import InflightError, ModelError, Unavailable, WorkerLost
from inflight.metrics import Metrics
from inflight.sched import Scheduler

log = logging.getLogger("inflight")

PULSE, PULSE_TIMEOUT = 10.0, 30.0
"""Seconds of idleness after which the shards get a step without rows, and seconds in which they must answer it. A shard
that hangs is so replaced before a request waits for it."""


class _Renewal(Exception):
    """The shards are to be started again, and no plan is in flight."""


@dataclass(frozen=True)
class _Flight:
    """A plan that is not answered yet.

    Attributes:
        starts: position of the first token of each chunk whose log-probabilities are asked for, by sequence id.
        method: `prefill` if the plan computes prompts, `pulse` if it has no rows, else `decode`.
        submitted: time of `perf_counter` when it was sent.
        tokens: of prompts that it computes.
    """

    starts: dict[int, int]
    method: str
    submitted: float
    tokens: int = 0


class StepLoop:
    """Plans steps, sends them and applies their results, until it is cancelled.

    Args:
        name: the model's name, for the log.
        policy: has the number of plans in flight and the timeout of a step.
        recovery: replaces lost shards.
        grammars: computes the masks of rows with a grammar.
        metrics: counts steps.
        files: has what lies in files of prompts.
        wake: set by others when there may be something to plan.
        on_up: called when lost shards are loaded again.

    Attributes:
        scheduler, streams: the requests that are computed.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        executor: Executor,
        scheduler: Scheduler,
        streams: Streams,
        recovery: Recovery,
        grammars: Grammars,
        metrics: Metrics | None,
        files: PromptCache,
        wake: asyncio.Event,
        on_up: Callable[[], None],
    ) -> None:
        self._name = name
        self._policy = policy
        self._executor = executor
        self.scheduler = scheduler
        self.streams = streams
        self._recovery = recovery
        self._grammars = grammars
        self._metrics = metrics
        self._files = files
        self._wake = wake
        self._on_up = on_up
        self._renew_at: float | None = None  # the time of `monotonic` at which rows that still run are given up
        self._flights: deque[_Flight] = deque()
        self._waiting_since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the shards take plans."""
        return self._recovery.up and not self._executor.lost

    @property
    def failing(self) -> str | None:
        """Why the shards cannot be loaded; None if they are, or may be soon."""
        return self._recovery.failing

    async def run(self) -> None:
        """Keeps plans in flight until it is cancelled; a loss of the shards starts them again."""
        while True:
            try:
                if not self._recovery.up:
                    await self._recovery.replace()
                    self._renew_at = None
                    self._on_up()
                await self._steps()
            except _Renewal:
                log.info("the shards of '%s' are started again, as was asked for", self._name)
                await self._executor.abort()
                await self._drop_flights()
            except WorkerLost as error:
                log.warning("the shards of '%s' were lost: %s", self._name, error)
                await self._drop_flights(isinstance(error, RanksKilled))
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the step loop of '%s' failed", self._name)
                for stream in self.streams.of(list(self.scheduler.requests)):
                    stream.fail(ModelError("internal server error, the server's log has the details"))
                    self.streams.close(stream)
                await self._executor.abort()
                await self._drop_flights()

    async def renew(self, grace: float) -> None:
        """Ends the shards and starts them again; returns when they are loaded.

        Args:
            grace: seconds in which running rows may end. Others are computed again from their known tokens.

        Raises:
            InflightError: the first start failed. It is repeated all the same.
        """
        self._recovery.started = self._recovery.started or asyncio.get_running_loop().create_future()
        started = self._recovery.started
        if self._recovery.up:
            self._renew_at = time.monotonic() + grace
            self._wake.set()
        await asyncio.shield(started)

    def _renewing(self) -> bool:
        """Whether no more steps are planned, since the shards are to end."""
        at = self._renew_at
        return at is not None and (not self.scheduler.running or time.monotonic() >= at)

    async def close(self) -> None:
        """Ends timers and tasks. To be called after `run` has ended."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._aborting is not None:
            await self._aborting
        self._recovery.tell(Unavailable("the model is being ended"))

    async def give_back(self) -> None:
        """Takes back what the shards computed, which are ended; to be called after `close`. `run` would start them."""
        await self._drop_flights(killed=True)

    async def _steps(self) -> None:
        scheduler, depth = self.scheduler, self._policy.plans_in_flight
        while True:
            renewing = self._renew_at is not None and self._renewing()
            if renewing and not scheduler.in_flight:
                raise _Renewal
            while scheduler.in_flight < depth and not self._executor.lost and not renewing:
                began = time.perf_counter()
                plan = scheduler.plan()
                if plan is not None:
                    self._note(plan, began)
                    self._executor.submit(plan)
                self._files.planned()
                if plan is None:
                    break
            if not scheduler.in_flight and not self._executor.lost:
                self._wake.clear()  # set by a new request, or when the shards are lost
                pulse = asyncio.get_running_loop().call_later(PULSE, self._pulse)
                await self._wake.wait()
                pulse.cancel()
                # Requests that arrive together start together.
                await asyncio.sleep(0)
                continue
            self._waiting_since = time.monotonic()
            if self._watch is None:
                self._start_watch(self._policy.step_timeout)
            self._take(await self._executor.result())

    async def _drop_flights(self, killed: bool = False) -> None:
        """Forgets the plans in flight after a loss of the shards.

        Args:
            killed: something outside this server ended them.
        """
        self._recovery.up = False
        if self._aborting is not None:
            await self._aborting
            self._aborting = None
        for flight in self._flights:
            if self._metrics is not None and flight.method != "pulse":
                self._metrics.generations.step_lost(flight.method)
        self._flights.clear()
        self._files.lost()
        self._recovery.lost(killed)

    # Shards that hang

    def _pulse(self) -> None:
        """Sends a step without rows after a time of idleness, to see whether the shards still answer."""
        plan = self.scheduler.pulse()
        if plan is None or self._executor.lost:
            return
        flight = _Flight({}, "pulse", time.perf_counter())
        self._flights.append(flight)
        self._executor.submit(plan)
        timeout = min(PULSE_TIMEOUT, self._policy.step_timeout)
        asyncio.get_running_loop().call_later(timeout, self._pulse_overdue, flight, timeout)
        self._wake.set()

    def _pulse_overdue(self, flight: _Flight, timeout: float) -> None:
        """Aborts the shards if the pulse is not answered yet."""
        if self._flights and self._flights[0] is flight and self._aborting is None:
            log.error("the idle shards of '%s' have not answered for %g seconds", self._name, timeout)
            self._aborting = asyncio.ensure_future(self._executor.abort())

    def _start_watch(self, seconds: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(seconds, self._watched)

    def _watched(self) -> None:
        """Aborts the shards if the current step takes too long. One timer serves many steps, which costs less."""
        self._watch = None
        if not self._flights or self._aborting is not None:
            return
        timeout = self._policy.step_timeout
        left = self._waiting_since + timeout - time.monotonic()
        if left > 0:
            self._start_watch(left)
            return
        log.error("a step of '%s' took longer than %g seconds", self._name, timeout)
        self._aborting = asyncio.ensure_future(self._executor.abort())  # `result` raises then

    # Plans and their results

    def _note(self, plan: StepPlan, began: float) -> None:
        """Records a plan, on which work `began` then, as in flight, and tells the streams of rows that begin."""
        starts: dict[int, int] = {}
        for admission in plan.prefill:
            stream = self.streams.get(admission.id)
            if stream is not None:
                stream.begin()
                if stream.sequence.sampling.prompt_logprobs:
                    starts[admission.id] = stream.sequence.planned - admission.chunk
        joined = sum(admission.token_ids is not None for admission in plan.prefill)
        method, now = "prefill" if plan.prefill else "decode", time.perf_counter()
        tokens = sum(admission.chunk for admission in plan.prefill)
        self._flights.append(_Flight(starts, method, now, tokens))
        if self._metrics is not None and (joined or plan.filter):
            left = len(plan.filter)
            self._metrics.generations.planned(method, now - began, joined, left, self.scheduler.running)
            if joined:
                tokens = sum(len(one.token_ids) for one in plan.prefill if one.token_ids is not None)
                self._metrics.generations.texts.batch(joined, tokens)

    def _take(self, result: StepResult) -> None:
        """Applies a result: gives tokens, log-probabilities and errors to the streams."""
        flight, began = self._flights.popleft(), time.perf_counter()
        self._recovery.answered()
        if flight.tokens:
            self._files.computed(flight.tokens, result.seconds)
        starts = flight.starts
        for id, values in result.prompt_logprobs.items():
            stream = self.streams.get(id)
            if stream is not None and id in starts:
                stream.prompt_logprobs(starts[id] + 1, values, result.prompt_top.get(id, ()))
        for id, error in failures(result):
            stream = self.streams.get(id)
            if stream is not None:
                stream.fail(error)
                self.streams.close(stream)
        logprobs, tops = result.logprobs, result.top
        masked: dict[int, tuple[Stream, Step]] = {}
        for sequence, token, index in self.scheduler.apply(result):
            stream = self.streams.get(sequence.id)
            if stream is None or stream.finished:
                self.scheduler.finish(sequence.id)
                continue
            logprob = logprobs[index] if logprobs is not None and sequence.sampling.logprobs else None
            stream.embedding = result.embeddings.get(sequence.id, stream.embedding)
            if stream.push(token, logprob, tops.get(index, ())):
                self.scheduler.finish(sequence.id)
            elif stream.follower is not None and sequence.mask is None:
                self._follow(stream, stream.follower, token, masked)
        if masked:
            self._mask(list(masked.values()))
        if self._metrics is not None and flight.method != "pulse":
            host = time.perf_counter() - began
            self._metrics.generations.step(flight.method, began - flight.submitted, result.seconds, host)

    def _follow(self, stream: Stream, follower: Follower, token: int, masked: dict[int, tuple[Stream, Step]]) -> None:
        """Adds a token to what a row's follower is to be asked for."""
        sequence = stream.sequence
        if sequence.id in masked:
            tokens = [*masked[sequence.id][1].tokens, token]
        else:
            tokens = [token]
        forced, guesses = self.scheduler.hopes(sequence)
        masked[sequence.id] = stream, Step(follower, tokens, sequence.tokens, forced, guesses)

    def _mask(self, masked: list[tuple[Stream, Step]]) -> None:
        """Computes the masks of the next tokens of these rows, off the event loop; until then the rows are on hold."""

        def done(found: list[Next | InflightError]) -> None:
            for (stream, _), next in zip(masked, found):
                if isinstance(next, InflightError):
                    stream.fail(next)
                    self.streams.close(stream)
                else:
                    sequence = stream.sequence
                    sequence.mask, sequence.draft, sequence.forced = next
            for stream, _ in masked:
                stream.home.wake()

        self._grammars.advance([step for _, step in masked], done)
