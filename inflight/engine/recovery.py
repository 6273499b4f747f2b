"""Starts a model's shards: the first time, and again whenever they are lost."""

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
"""Restarts for which the shards say one after the other why they cannot load, before those who wait are told so; it is
tried again none the less. A rank that was killed while it loaded has said nothing, and does not count."""

KILLED_DELAY = 2.0
"""The longest pause in seconds before shards are started again that somebody killed."""

PATIENCE = 600.0
"""Seconds without shards after which requests without a deadline of their own are given up, and new ones refused."""


async def first_start(
    executor: Executor, name: str, restart: RestartPolicy, stopping: Callable[[], bool]
) -> ShardOffer:
    """Shards that somebody killed while they loaded are started again, but not for ever: nothing has ever been
    ready here, and the system itself may kill what takes too much memory.

    Args:
        name: of the model, for the log.
        stopping: the engine was told to stop meanwhile.

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
        name: of the model, for the log.
        num_blocks: of the cache, as the first start has decided.
        learn: takes over what new shards offer; gives what the scheduler has for requests then.

    Attributes:
        up: there are shards, and they are loaded.
        failing: why they cannot be loaded; new requests are refused with it. None where that is not so.
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
    ) -> None:
        self._name = name
        self._executor = executor
        self._restart = restart
        self._scheduler = scheduler
        self._streams = streams
        self._num_blocks = num_blocks
        self._learn = learn
        self._back_off = 0.0  # seconds until the next start; none where the last one has led to an answer
        self.up = True
        self.failing: str | None = None

    def answered(self) -> None:
        """The shards have answered a step."""
        self._back_off = 0.0

    def lost(self, killed: bool) -> None:
        """The shards are gone, and what they had in flight: who was computed waits again, who is guilty fails.

        Args:
            killed: somebody else ended them.
        """
        self.up = False
        self._back_off = min(self._back_off, KILLED_DELAY) if killed else self._back_off
        for sequence in self._scheduler.lost(killed):
            self._streams.fail(
                sequence,
                WorkerLost("the model's worker died whenever it computed this request; it is not tried again"),
            )

    async def replace(self) -> None:
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
                    self._take_over(await self._executor.start(self._num_blocks))
                except RanksKilled as error:
                    log.warning("the shards of '%s' were lost while they loaded: %s", self._name, error)
                    self._back_off = min(self._back_off, KILLED_DELAY)
                except InflightError as error:
                    refusals += 1
                    log.error("the shards of '%s' cannot start: %s", self._name, error)
                    if refusals >= FAILED_STARTS:
                        self._refuse(str(error), self._streams.all())
                else:
                    self.failing = None
                    self.up = True
                    return
        finally:
            patience.cancel()

    def _give_up(self) -> None:
        """The shards do not come back."""
        waiting = [stream for stream in self._streams.all() if stream.request.timeout is None]
        self._refuse(f"its worker has not come back within {PATIENCE:g} seconds", waiting)

    def _refuse(self, why: str, streams: Items[Stream]) -> None:
        """Fails these streams, and new requests until the shards are there again."""
        self.failing = why
        for stream in streams:
            stream.fail(Unavailable(f"the model cannot be loaded now: {why}"))

    def _take_over(self, offer: ShardOffer) -> None:
        """Where the cache is not as large as it was, because memory is short, or is so again, the scheduler is told."""
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
