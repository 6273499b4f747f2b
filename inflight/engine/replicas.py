"""How many replicas a model has: loads the first ones, adds those that come later, and ends those that are too many."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Any

from inflight.config import GeneratorConfig, RestartPolicy
from inflight.contract import ShardOffer
from inflight.engine.executor import Executor
from inflight.engine.lane import Lane
from inflight.engine.lanes import Lanes
from inflight.engine.recovery import first_start
from inflight.engine.streams import Streams
from inflight.errors import InflightError
from inflight.sched import Pressure, Scaler

log = logging.getLogger("inflight")

LOOK = 0.5
"""Seconds between two looks at the queues."""


class Replicas:
    """The replicas of one model over time. Lives on one event loop.

    Where machines come and go (`Executor.elastic`) a model serves as soon as one replica is loaded, and the others join
    it when there is room for them; else all of the first ones are loaded before it serves.

    Args:
        executors: one for each replica that there may ever be, by number.
        lanes: holds the replicas that compute.
        open_lane: makes the replica of an executor that is loaded; may raise StartError.
        close_lane: called with the number of a replica that has ended.
        stopping: whether the engine stops.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        executors: Items[Executor],
        lanes: Lanes,
        streams: Streams,
        restart: RestartPolicy,
        open_lane: Callable[[int, ShardOffer], Lane],
        close_lane: Callable[[int], None],
        stopping: Callable[[], bool],
    ) -> None:
        scaling = config.scaling
        self._name = config.name
        self._executors = executors
        self._lanes = lanes
        self._streams = streams
        self._restart = restart
        self._open_lane = open_lane
        self._close_lane = close_lane
        self._stopping = stopping
        self._least = min(config.least, len(executors)) if scaling.scales else len(executors)
        self._scaler = Scaler(self._least, len(executors), scaling.queue_time, scaling.idle_time)
        self._late: dict[int, asyncio.Task[ShardOffer]] = {}  # not loaded when the model began to serve
        self._joining: dict[int, asyncio.Task[None]] = {}
        self._leaving: dict[int, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    @property
    def coming(self) -> int:
        """Replicas that are on their way."""
        return len(self._joining)

    async def load(self) -> dict[int, ShardOffer]:
        """Loads the first replicas.

        Returns:
            The offers of those that are loaded, by number.

        Raises:
            StartError: one cannot be loaded. The executors are still to be given up.
        """
        needed = 1 if any(executor.elastic for executor in self._executors) else self._least
        tasks = {number: asyncio.ensure_future(self._first(number)) for number in range(self._least)}
        try:
            while sum(task.done() for task in tasks.values()) < needed:
                waiting = [task for task in tasks.values() if not task.done()]
                for task in (await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))[0]:
                    task.result()
        except BaseException:
            await _end(tasks.values())
            raise
        self._late = {number: task for number, task in tasks.items() if not task.done()}
        return {number: task.result() for number, task in tasks.items() if task.done()}

    def begin(self) -> None:
        """Lets the others join, and begins to look at the queues where the number may change."""
        for number, task in self._late.items():
            self._joining[number] = asyncio.ensure_future(self._join(number, task))
        if self._least < len(self._executors):
            self._looking = asyncio.ensure_future(self._look())

    async def stop(self) -> None:
        """Changes the number no more. Replicas that compute are not ended."""
        tasks = [*self._late.values(), *self._joining.values(), *self._leaving.values()]
        await _end([*tasks, self._looking] if self._looking is not None else tasks)
        self._joining.clear()
        self._leaving.clear()

    def pressure(self) -> Pressure:
        lanes = [lane for lane in self._lanes.all if lane.number not in self._leaving]
        heads = [sequence.id for lane in lanes for sequence in lane.scheduler.heads()]
        return Pressure(
            len(lanes) + len(self._joining),
            len(self._joining) + sum(not lane.up for lane in lanes),
            max((stream.waited for stream in self._streams.of(heads)), default=0.0),
            sum(lane.scheduler.running for lane in lanes),
            min((lane.scheduler.capacity.max_rows for lane in lanes), default=1),
        )

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            seen = self.pressure()
            count = self._scaler.look(time.monotonic(), seen)
            if count > seen.replicas:
                self._grow(seen)
            elif count < seen.replicas and not self._lanes.renewing:
                self._shrink()

    def _grow(self, seen: Pressure) -> None:
        used = {*self._joining, *self._leaving, *(lane.number for lane in self._lanes.all)}
        number = next((each for each in range(len(self._executors)) if each not in used), None)
        if number is not None:
            log.info("'%s' gets replica %d: a request has waited %.1f s", self._name, number, seen.waited)
            self._joining[number] = asyncio.ensure_future(self._join(number))

    def _shrink(self) -> None:
        late = max(self._joining, default=None)
        if late is not None:
            log.info("replica %d of '%s' is not waited for any more: it is not needed", late, self._name)
            self._leaving[late] = asyncio.ensure_future(self._give_up(late, self._joining.pop(late)))
            return
        lanes = [lane for lane in self._lanes.all if lane.number not in self._leaving]
        lane = min(lanes, key=lambda lane: (lane.up, len(lane.scheduler.requests), -lane.number))
        log.info("replica %d of '%s' ends: the others are enough", lane.number, self._name)
        self._leaving[lane.number] = asyncio.ensure_future(self._retire(lane))

    async def _retire(self, lane: Lane) -> None:
        try:
            if await self._lanes.retire(lane):
                self._close_lane(lane.number)
        finally:
            self._leaving.pop(lane.number, None)

    async def _give_up(self, number: int, joining: asyncio.Task[None]) -> None:
        try:
            await _end([joining])
            await self._executors[number].close()
        finally:
            self._leaving.pop(number, None)

    async def _first(self, number: int) -> ShardOffer:
        return await first_start(self._executors[number], self._name, self._restart, self._stopping)

    async def _join(self, number: int, loading: asyncio.Task[ShardOffer] | None = None) -> None:
        """Loads a replica until that succeeds, and lets it compute."""
        delay = self._restart.first_delay
        while True:
            try:
                lane = self._open_lane(number, await (loading if loading is not None else self._first(number)))
                break
            except InflightError as error:
                log.error("replica %d of '%s' cannot start: %s", number, self._name, error)
            except Exception:  # the number of replicas must go on following the queue
                log.exception("replica %d of '%s' cannot start", number, self._name)
            loading = None
            await self._executors[number].close()
            await asyncio.sleep(delay)
            delay = self._restart.after(delay)
        self._joining.pop(number, None)
        self._lanes.add(lane)


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their ends."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
