"""One replica of a language model inside the engine: its ranks with the scheduler and the step loop that are theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items

from inflight.config import GeneratorConfig, RestartPolicy
from inflight.contract import EncodedImage, ShardOffer
from inflight.engine.executor import Executor
from inflight.engine.grammars import Grammars
from inflight.engine.loop import StepLoop
from inflight.engine.prompt_cache import PromptCache
from inflight.engine.recovery import Recovery
from inflight.engine.streams import Streams
from inflight.metrics import Load, Metrics, PromptCacheCounts, PromptsShown, ReplicaLoad, StateSlots
from inflight.sched import Bid, Capacity, Prospects, Scheduler, Sequence

LOOK = 0.05
"""Seconds between two looks whether a replica's last requests have ended."""


class Lane:
    """One replica: a queue, a cache and the ranks behind them. The home of the streams that it computes.

    Args:
        config: the model.
        number: of the replica.
        offer: of the ranks that are loaded; `capacity`: what may be planned with it.
        learn: called with the offer of ranks that were started again; returns what may be planned.
        hand_over: called when requests here need not wait for the ranks, if another replica can take them.
        on_up: called when the ranks are loaded again.

    Attributes:
        executor: the ranks.
        scheduler: the requests that are computed here.
        prospects: what a further request would cost here.
        leaving: its ranks are to be started again, so it gets no request that another replica can take.
        placed, taken_over: requests that were given to it when they came, and that it took over from other replicas.
        prompted, cached: tokens of the prompts of the former, and those of them that needed no computing.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        number: int,
        executor: Executor,
        offer: ShardOffer,
        capacity: Capacity,
        streams: Streams,
        grammars: Grammars,
        metrics: Metrics | None,
        restart: RestartPolicy,
        learn: Callable[[ShardOffer], Capacity],
        hand_over: Callable[[Lane], None],
        on_up: Callable[[Lane], None],
    ) -> None:
        name = config.name if config.replicas == 1 else f"{config.name} (replica {number})"
        self.number = number
        self.executor = executor
        self.scheduler = scheduler = Scheduler(capacity)
        self.prospects = Prospects(scheduler)
        self._wake = asyncio.Event()
        executor.on_lost = self.wake
        self._keeps = bool(offer.prompt_cache)
        self._counts = PromptCacheCounts()
        self._files = PromptCache(config.model.prompt_cache, scheduler, executor, self._counts, self.wake)
        self._files.opened(offer)

        def learned(offer: ShardOffer) -> Capacity:
            self._files.opened(offer)
            return learn(offer)

        blocks = offer.cache.num_blocks
        recovery = Recovery(
            name, executor, restart, scheduler, streams, blocks, learned, hand_over=lambda: hand_over(self)
        )
        self._steps = StepLoop(
            name,
            config.policy,
            executor,
            scheduler,
            streams,
            recovery,
            grammars,
            metrics,
            self._files,
            self._wake,
            on_up=lambda: on_up(self),
        )
        self._task: asyncio.Task[None] | None = None
        self.leaving = False
        self.placed = self.taken_over = self.prompted = self.cached = 0

    @property
    def up(self) -> bool:
        """Whether the ranks take plans."""
        return self._steps.up

    @property
    def failing(self) -> str | None:
        """Why the ranks cannot be loaded; None if they are, or may be soon."""
        return self._steps.failing

    @property
    def load(self) -> Load:
        """Requests and cache tokens in use now."""
        scheduler = self.scheduler
        size, pool = scheduler.capacity.block_size, scheduler.pool
        return Load(scheduler.running, self.waiting, (pool.count - pool.free) * size, pool.count * size)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row, or for what files have of their prompts."""
        return self.scheduler.waiting + self._files.waiting

    def prompts(self, model: str) -> PromptsShown:
        """Its prompt cache and its recurrent states, for the metrics. Args: model: its name."""
        scheduler = self.scheduler
        pool, slots = scheduler.states.pool, None
        if pool.count:
            waiting = scheduler.waiting if scheduler.short_of_states else 0
            slots = StateSlots(pool.used - pool.saved, pool.saved, pool.count - pool.used, waiting)
        return PromptsShown(model, self.number, self._counts if self._keeps else None, slots)

    def shown(self, model: str) -> ReplicaLoad:
        """Its load and history, for the metrics. Args: model: its name."""
        return ReplicaLoad(
            model, self.number, self.up, self.load, self.placed, self.taken_over, self.prompted, self.cached
        )

    def begin(self) -> None:
        """Begins to compute."""
        self._task = asyncio.ensure_future(self._steps.run())

    async def end(self) -> None:
        """Computes no more. The ranks are not ended."""
        while self._task is not None and not self._task.done():
            self._task.cancel()
            # Before Python 3.12 `wait_for` drops a cancellation that comes together with its result, so cancel again.
            await asyncio.wait([self._task], timeout=0.2)
        await self._files.close()
        await self._steps.close()

    async def leave(self, grace: float) -> None:
        """Ends the ranks once the running requests have ended, or `grace` seconds have passed; what is left goes to the
        other replicas. `begin` would start the ranks again."""
        until = asyncio.get_running_loop().time() + grace
        while self.up and self.scheduler.running and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LOOK)
        await self.end()
        await self.executor.close()
        await self._steps.give_back()

    async def renew(self, grace: float) -> None:
        """As `StepLoop.renew`."""
        await self._steps.renew(grace)

    # The home of streams

    def add(self, sequence: Sequence) -> None:
        self._files.add(sequence)
        self._wake.set()

    def finish(self, id: int) -> None:
        self._files.finish(id)
        self.scheduler.finish(id)
        self._wake.set()

    def restore(self, sequence: Sequence, images: Items[EncodedImage]) -> None:
        self.scheduler.restore(sequence, images)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    # The router's side

    def bid(self, sequence: Sequence) -> Bid:
        return self.prospects.bid(sequence)

    def fits(self, sequence: Sequence) -> bool:
        """Whether its cache can ever hold the request."""
        return sequence.stop_at - 1 <= self.scheduler.capacity.total_tokens

    def give(self, sequence: Sequence, bid: Bid) -> None:
        """Notes that a new request comes here for this bid."""
        self.prospects.promise(sequence, bid)
        self.placed += 1
        self.prompted += len(sequence.tokens)
        self.cached += len(sequence.tokens) - bid.own

    def take_over(self, sequence: Sequence, bid: Bid) -> None:
        """Takes a request from another replica."""
        self.prospects.promise(sequence, bid)
        self.taken_over += 1
        self.scheduler.adopt(sequence)
        self._wake.set()
