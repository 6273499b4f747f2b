"""Starts a model's shards for the first time, and again after each loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from collections.abc import Sequence as Items

from inflight.config import RestartPolicy
from inflight.contract import ShardOffer
from inflight.engine.executor import Executor, RanksKilled
from inflight.engine.stream import Stream
from inflight.engine.streams import Streams
from inflight.errors import InflightError, StartError, Unavailable, WorkerLost
from inflight.sched import Capacity, Scheduler
from inflight.startup import KILLED_STARTS, killed_too_often

log = logging.getLogger("inflight")

FAILED_STARTS = 3
"""Failed restarts after which waiting requests fail with the shards' own error; restarts go on. A start during which a
rank was killed does not count, because that says nothing about the model."""

KILLED_DELAY = 2.0
"""The longest pause in seconds before the restart of shards that were killed from outside."""

PATIENCE = 600.0
"""Seconds without shards after which requests without a deadline fail and new requests are refused."""


async def first_start(
    executor: Executor, name: str, restart: RestartPolicy, stopping: Callable[[], bool]
) -> ShardOffer:
    """Starts the shards of an engine that begins. Shards that are killed while they load are started again, a few times
    only: the system may kill them because they need too much memory.

    Args:
        name: the model's name, for the log.
        stopping: whether the engine was told to stop.

    Raises:
        StartError: with the shards' own text, or that they were killed each time.
    """
    failed, start = StartError("the server stops"), executor.first
    for _ in range(KILLED_STARTS):
        if stopping():
            raise failed
        try:
            return await start()
        except RanksKilled as error:
            failed = StartError(str(error))
        log.warning("the shards of '%s' were lost while they loaded: %s", name, failed)
        start = executor.start
        await asyncio.sleep(min(restart.first_delay, KILLED_DELAY))
    raise killed_too_often(failed)


class Recovery:
    """Replaces lost shards.

    Args:
        name: the model's name, for the log.
        num_blocks: size of the cache that the first start decided.
        learn: called with the offer of new shards; returns what the scheduler may plan with.
        hand_over: gives requests that need not wait for these shards to other replicas of the model.

    Attributes:
        up: the shards are loaded.
        started: who waits for the next start: it gets the error of one that fails with a reason.
        failing: the error that new requests get, while the shards cannot be loaded; else None.
    """

    def __init__(
        self,
        name: str,
        executor: Executor,
        restart: RestartPolicy,
        scheduler: Scheduler,
        streams: Streams,
        num_blocks: int,
        learn: Callable[[ShardOffer], Capacity],
        hand_over: Callable[[], None],
    ) -> None:
        self._name = name
        self._executor = executor
        self._restart = restart
        self._scheduler = scheduler
        self._streams = streams
        self._num_blocks = num_blocks
        self._learn = learn
        self._hand_over = hand_over
        self.started: asyncio.Future[None] | None = None
        self._back_off = 0.0  # seconds before the next start; 0 once the shards have answered a step
        self.up = True
        self.failing: str | None = None

    def answered(self) -> None:
        """Notes that the shards answered a step: the next restart needs no pause."""
        self._back_off = 0.0

    def lost(self, killed: bool) -> None:
        """Takes back what the lost shards computed: sequences wait again, here or at another replica; those that caused
        the loss fail.

        Args:
            killed: something outside this server ended the shards.
        """
        self.up = False
        self._back_off = min(self._back_off, KILLED_DELAY) if killed else self._back_off
        for sequence in self._scheduler.lost(killed):
            self._streams.fail(
                sequence,
                WorkerLost("the model's worker died whenever it computed this request; it is not tried again"),
            )
        self._hand_over()

    async def replace(self) -> None:
        """Starts the shards again until they are loaded. Running requests then go on from their known tokens.

        The first start comes at once if the last shards answered a step, all others after a back-off. Requests wait
        until their deadline, or `PATIENCE` seconds without one. They fail earlier only with an error that the shards
        themselves report (`FAILED_STARTS`).
        """
        refusals = 0
        patience = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)
        try:
            while True:
                await asyncio.sleep(self._back_off)
                self._back_off = self._restart.after(self._back_off)
                try:
                    self._take_over(await self._executor.start(self._num_blocks))
                except RanksKilled as error:
                    log.warning("the shards of '%s' were lost while they loaded: %s", self._name, error)
                    self._back_off = min(self._back_off, KILLED_DELAY)
                except InflightError as error:
                    refusals += 1
                    log.error("the shards of '%s' cannot start: %s", self._name, error)
                    self.tell(error)
                    if refusals >= FAILED_STARTS:
                        self.failing = str(error)
                        self._hand_over()
                        self._refuse(self._own())
                else:
                    self.failing = None
                    self.up = True
                    self.tell()
                    return
        finally:
            patience.cancel()

    def _give_up(self) -> None:
        """Fails the requests that have no deadline: the shards do not come back."""
        self.failing = f"its worker has not come back within {PATIENCE:g} seconds"
        self._hand_over()
        self._refuse([stream for stream in self._own() if stream.request.timeout is None])

    def _own(self) -> Items[Stream]:
        """The streams that wait for these shards."""
        return self._streams.of(list(self._scheduler.requests))

    def _refuse(self, streams: Items[Stream]) -> None:
        """Fails these streams now."""
        for stream in streams:
            stream.fail(Unavailable(f"the model cannot be loaded now: {self.failing}"))

    def tell(self, error: InflightError | None = None) -> None:
        """Tells who waits for the start how it went."""
        told, self.started = self.started, None
        if told is None or told.done():
            return
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)

    def _take_over(self, offer: ShardOffer) -> None:
        """Resizes the scheduler's cache if the new shards have more or less memory for it than the last ones."""
        capacity = self._learn(offer)
        if capacity == self._scheduler.capacity:
            return
        before, room = self._scheduler.capacity.total_tokens, capacity.total_tokens
        log.warning("the cache of '%s' holds %d tokens now instead of %d", self._name, room, before)
        for sequence in self._scheduler.resize(capacity):
            self._streams.fail(
                sequence,
                Unavailable(
                    f"the model was started anew and memory has become short: its cache holds {room} tokens now, and "
                    f"this request may need {sequence.stop_at - 1}; ask for fewer, or free memory on the server"
                ),
            )
