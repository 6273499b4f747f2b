"""The step loop: keeps plans in flight, gives their results to the streams, notices shards that hang or are lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass

from inflight.config import Policy
from inflight.contract import StepPlan, StepResult
from inflight.engine.checks import failures
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.grammars import Grammars
from inflight.engine.recovery import Recovery
from inflight.engine.stream import Stream
from inflight.engine.streams import Streams
from inflight.errors import InflightError, ModelError, WorkerLost
from inflight.metrics import Metrics
from inflight.sched import Scheduler
from inflight.text import Matcher

log = logging.getLogger("inflight")

PULSE, PULSE_TIMEOUT = 10.0, 30.0
"""Seconds of idleness after which the shards are asked for a step without rows, and in which they must answer it: so
one that hangs is replaced before a request waits for it."""


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


class StepLoop:
    """Runs until it is cancelled.

    Args:
        name: of the model, for the log.
        policy: how many plans may be in flight, and how long a step may take.
        recovery: replaces shards that are lost.
        grammars: gives the masks of rows that follow one.
        metrics: where steps are counted.
        wake: set when there may be something to plan.

    Attributes:
        scheduler, streams: of the requests that it computes.
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
        wake: asyncio.Event,
    ) -> None:
        self._name = name
        self._policy = policy
        self._executor = executor
        self.scheduler = scheduler
        self.streams = streams
        self._recovery = recovery
        self._grammars = grammars
        self._metrics = metrics
        self._wake = wake
        self._flights: deque[_Flight] = deque()
        self._waiting_since = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """The shards take plans."""
        return self._recovery.up and not self._executor.lost

    @property
    def failing(self) -> str | None:
        """Why the shards cannot be loaded, where that is so."""
        return self._recovery.failing

    async def run(self) -> None:
        """Keeps plans in flight until it is cancelled; a loss of the shards starts them again."""
        while True:
            try:
                if not self._recovery.up:
                    await self._recovery.replace()
                await self._steps()
            except WorkerLost as error:
                log.warning("the shards of '%s' were lost: %s", self._name, error)
                await self._mourn(isinstance(error, RanksKilled))
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the step loop of '%s' failed", self._name)
                for stream in self.streams.all():
                    stream.fail(ModelError("internal server error, the server's log has the details"))
                    self.streams.close(stream)
                await self._executor.abort()
                await self._mourn()

    async def close(self) -> None:
        """What it has begun ends. To be called when `run` has ended."""
        if self._watch is not None:
            self._watch.cancel()
        if self._aborting is not None:
            await self._aborting

    async def _steps(self) -> None:
        scheduler, depth = self.scheduler, self._policy.plans_in_flight
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
                self._watch_after(self._policy.step_timeout)
            self._take(await self._executor.result())

    async def _mourn(self, killed: bool = False) -> None:
        """The shards are gone, and what they had in flight."""
        self._recovery.up = False
        if self._aborting is not None:
            await self._aborting
            self._aborting = None
        for flight in self._flights:
            if self._metrics is not None and flight.method != "pulse":
                self._metrics.generations.step_lost(flight.method)
        self._flights.clear()
        self._recovery.lost(killed)

    # Shards that hang

    def _pulse(self) -> None:
        """Nobody has asked for anything for a while: do the shards still answer?"""
        plan = self.scheduler.pulse()
        if plan is None or self._executor.lost:
            return
        flight = _Flight({}, "pulse", time.perf_counter())
        self._flights.append(flight)
        self._executor.submit(plan)
        timeout = min(PULSE_TIMEOUT, self._policy.step_timeout)
        asyncio.get_running_loop().call_later(timeout, self._missed, flight, timeout)
        self._wake.set()

    def _missed(self, flight: _Flight, timeout: float) -> None:
        if self._flights and self._flights[0] is flight and self._aborting is None:
            log.error("the idle shards of '%s' have not answered for %g seconds", self._name, timeout)
            self._aborting = asyncio.ensure_future(self._executor.abort())

    def _watch_after(self, seconds: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(seconds, self._watched)

    def _watched(self) -> None:
        """Gives the shards up where one step takes too long. One timer for many steps: a timer each would cost more."""
        self._watch = None
        if not self._flights or self._aborting is not None:
            return
        timeout = self._policy.step_timeout
        left = self._waiting_since + timeout - time.monotonic()
        if left > 0:
            self._watch_after(left)
            return
        log.error("a step of '%s' took longer than %g seconds", self._name, timeout)
        self._aborting = asyncio.ensure_future(self._executor.abort())  # whoever waits for the result learns of it

    # Plans and their results

    def _note(self, plan: StepPlan) -> None:
        """What the host must remember of a plan until its answer comes."""
        starts: dict[int, int] = {}
        for admission in plan.prefill:
            stream = self.streams.get(admission.id)
            if stream is not None:
                stream.begin()
                if stream.sequence.sampling.prompt_logprobs:
                    starts[admission.id] = stream.sequence.planned - admission.chunk
        joined = sum(admission.token_ids is not None for admission in plan.prefill)
        self._flights.append(_Flight(starts, "prefill" if plan.prefill else "decode", time.perf_counter()))
        if self._metrics is not None and joined:
            self._metrics.generations.planned(joined, self.scheduler.running)

    def _take(self, result: StepResult) -> None:
        flight, began = self._flights.popleft(), time.perf_counter()
        self._recovery.answered()
        starts = flight.starts
        for id, values in result.prompt_logprobs.items():
            stream = self.streams.get(id)
            if stream is not None and id in starts:
                stream.prompt_logprobs(starts[id] + 1, values)
        for id, error in failures(result):
            stream = self.streams.get(id)
            if stream is not None:
                stream.fail(error)
                self.streams.close(stream)
        logprobs, tops = result.logprobs, result.top
        masked: list[tuple[Stream, Matcher, int]] = []
        for sequence, token, index in self.scheduler.apply(result):
            stream = self.streams.get(sequence.id)
            if stream is None or stream.finished:
                self.scheduler.finish(sequence.id)
                continue
            logprob = logprobs[index] if logprobs is not None and sequence.sampling.logprobs else None
            stream.embedding = result.embeddings.get(sequence.id, stream.embedding)
            if stream.push(token, logprob, tops.get(sequence.id, ())):
                self.scheduler.finish(sequence.id)
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
                    self.streams.close(stream)
                else:
                    stream.sequence.mask = mask
            self._wake.set()

        self._grammars.advance([(matcher, token) for _, matcher, token in masked], done)
