"""The ranks of one replica as worker processes, on this machine or on those of a cluster: the engine's executor."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from inflight.config import AdapterConfig, GeneratorConfig, ServerConfig
from inflight.contract import ShardOffer, StepPlan, StepResult, Transfer, Transferred
from inflight.engine.executor import Executor, RanksKilled
from inflight.errors import InflightError, StartError, WorkerLost
from inflight.link import (
    AdapterReady,
    AnyMessage,
    DropAdapter,
    Failed,
    Leaving,
    LoadAdapter,
    LoadShard,
    Packer,
    Progress,
    ShardReady,
    Unpacker,
)
from inflight.place import STOP_GRACE, Here, PlacedRank, Placement, WorkerHandle
from inflight.startup import ProgressBar, waited_for

log = logging.getLogger("inflight")

FAREWELL = 0.2
"""Seconds to wait for the end of a killed rank when another rank reports an error that it may have caused."""


class _Rank:
    """The worker process of one rank.

    Attributes:
        worker: the process; None until `start`.
        offer: set when the rank is loaded.
        failure: the error text that it sent.
        killed: set if it was ended from outside without sending an error.
        loaded: the share of its weights that is loaded.
        adapters: those that it was told to load and has not answered yet, by number.
    """

    def __init__(self, number: int, group: ShardGroup) -> None:
        self.number = number
        self._group = group
        self.worker: WorkerHandle | None = None
        self.offer: asyncio.Future[ShardOffer] = asyncio.get_running_loop().create_future()
        self.failure: str | None = None
        self.killed: RanksKilled | None = None
        self.loaded = 0.0
        self.adapters: dict[int, asyncio.Future[None]] = {}

    def take(self, placed: PlacedRank) -> None:
        """Takes charge of the process: from now on it is ended with the group."""
        self.worker = WorkerHandle(f"rank {self.number}", placed.process, self._received, self._ended)
        self._group.started(self.worker)

    async def connect(self, placed: PlacedRank) -> None:
        """Connects to the process and sends it the job, unless it was told the job already."""
        assert self.worker is not None
        await self.worker.connect()
        if not placed.told:
            self.worker.send(LoadShard(placed.job))

    def _received(self, message: AnyMessage, values: Unpacker) -> None:
        if isinstance(message, StepResult):
            self._group.answered(message)
        elif isinstance(message, Transferred):
            self._group.transferred(self, message)
        elif isinstance(message, Progress):
            self.loaded = message.done
            self._group.progressed()
        elif isinstance(message, ShardReady):
            if not self.offer.done():
                self.offer.set_result(message.offer)
        elif isinstance(message, AdapterReady):
            told = self.adapters.pop(message.number, None)
            if told is not None and not told.done():
                if message.text:
                    told.set_exception(StartError(message.text))
                else:
                    told.set_result(None)
        elif isinstance(message, Failed):
            self.failure = message.text
            self._group.rank_lost(self, StartError(message.text))
        elif isinstance(message, Leaving):
            self.killed = RanksKilled(f"rank {self.number}: it was asked to end")
            self._group.rank_lost(self, self.killed)

    def load_adapter(self, adapter: AdapterConfig) -> asyncio.Future[None]:
        """Tells the rank of an adapter; done when it has it. Raises as `ShardGroup.load_adapter`."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.worker is None:
            told.set_exception(WorkerLost("the rank has not begun"))
        else:
            self.adapters[adapter.number] = told
            self.worker.send(LoadAdapter(adapter))
        return told

    def lose_adapters(self) -> None:
        """Ends the waits for adapters."""
        for told in self.adapters.values():
            if not told.done():
                told.set_exception(WorkerLost("the rank was lost while it loaded an adapter"))
                told.exception()
        self.adapters.clear()

    def _ended(self, worker: WorkerHandle) -> None:
        text = f"rank {self.number}: it ended with status {worker.status}"
        if worker.killed and self.failure is None and self.killed is None:
            self.killed = RanksKilled(f"{text}: it was killed")
        self._group.rank_lost(self, self.killed or StartError(self.failure or text))


class ShardGroup(Executor):
    """Runs one process for each rank. When one is lost the group is lost, and `start` replaces all of them.

    Args:
        config: the model.
        server: has the start timeout and the directory of logs.
        progress: makes the progress bar of one start; None: no progress is shown.
        placement: where the processes run; None: on this machine.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        server: ServerConfig,
        progress: Callable[[], ProgressBar] | None = None,
        placement: Placement | None = None,
    ) -> None:
        self._config = config
        self._placement = placement or Here(server.log_dir)
        self.elastic = self._placement.elastic
        self._placing: asyncio.Task[None] | None = None
        self._server = server
        self._make_progress = progress
        self._progress: ProgressBar | None = None
        self._ranks: list[_Rank] = []
        self._workers: list[WorkerHandle] = []  # not ended yet: a cancelled `_end` leaves them to the next
        self._results: deque[StepResult] = deque()
        self._orders: dict[int, list[Transferred]] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._error: WorkerLost | None = None
        self._starts = 0
        self._up = False  # the ranks are loaded, as far as is known

    @property
    def pids(self) -> list[int]:
        """Process ids of the running ranks, in order."""
        return [rank.worker.pid for rank in self._ranks if rank.worker is not None and rank.worker.running]

    @property
    def lost(self) -> bool:
        return self._error is not None

    async def start(self, num_blocks: int | None = None) -> ShardOffer:
        await self._end(0)
        self._error = None
        self._results.clear()
        self._orders.clear()
        self._ranks = [_Rank(number, self) for number in range(self._config.tensor_parallel)]
        self._progress = self._make_progress() if self._make_progress is not None else None
        loaded, told = False, self._config.model.adapters
        try:
            await self._place(num_blocks)
            waiting = asyncio.gather(*(rank.offer for rank in self._ranks))
            # A start that is cancelled does not take the result, which asyncio would print as an error.
            waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            offers = await waited_for(self._phase, asyncio.wait_for(waiting, self._server.start_timeout))
            loaded = self._up = True
            offers = await self._catch_up(told, offers)
        except asyncio.TimeoutError:
            await self._end(0)
            raise StartError(
                f"the model was not loaded within {self._server.start_timeout:g} seconds; raise --start-timeout where "
                "that may take so long"
            ) from None
        except StartError as error:
            killed = await self._killed()
            await self._end(0)
            raise killed or error from None
        except BaseException:
            await self._end(0)
            raise
        finally:
            if self._progress is not None:
                self._progress.close(whole=loaded)
        self._starts += 1
        return _smallest(offers)

    async def _place(self, num_blocks: int | None) -> None:
        """Starts the processes and connects to them. Waits for a machine with room, where there may be one later."""
        ranks = self._ranks

        async def place() -> None:
            placed = await self._placement.start(self._config, num_blocks, self._starts > 0)
            for rank, one in zip(ranks, placed):
                rank.take(one)
            for rank, one in zip(ranks, placed):
                await rank.connect(one)

        self._placing = placing = asyncio.ensure_future(place())
        try:
            await placing
        except asyncio.CancelledError:
            if self._placing is not None:  # this task itself is cancelled
                raise
            raise StartError("the model was given up before there was room for it") from None
        except WorkerLost as error:  # a machine was lost meanwhile, which says nothing about the model
            raise RanksKilled(str(error)) from error
        finally:
            self._placing = None

    def _phase(self) -> str:
        """Names the first rank that is not ready, and its progress, for the log."""
        number, done = next(((rank.number, rank.loaded) for rank in self._ranks if not rank.offer.done()), (0, 0.0))
        what = f"has loaded {done:.0%} of the weights" if done else "starts and opens the model"
        return f"rank {number} of language model '{self._config.name}' {what}"

    async def _catch_up(self, told: Sequence[AdapterConfig], offers: list[ShardOffer]) -> list[ShardOffer]:
        """Loads the adapters that came while the ranks loaded."""
        known = [each.number for each in _numbered(told)]
        late = [each for each in _numbered(self._config.model.adapters) if each.number not in known]
        for adapter in late:
            try:
                await self._told(adapter)
            except StartError as error:
                log.error("%s", error)
                continue
            offers = [msgspec.structs.replace(each, adapters=(*each.adapters, adapter.number)) for each in offers]
        return offers

    async def load_adapter(self, adapter: AdapterConfig) -> None:
        self._keep(adapter.number, adapter)
        if self.lost or not self._up:
            raise WorkerLost("the ranks are being started again")
        try:
            await self._told(adapter)
        except StartError:
            self.drop_adapter(adapter.number)
            raise

    async def _told(self, adapter: AdapterConfig) -> None:
        waiting = [rank.load_adapter(adapter) for rank in self._ranks]
        try:
            await asyncio.wait_for(asyncio.gather(*waiting), self._server.start_timeout)
        except asyncio.TimeoutError:
            raise StartError(
                f"the adapter '{adapter.name}' was not loaded within {self._server.start_timeout:g} seconds "
                "(--start-timeout)"
            ) from None

    def drop_adapter(self, number: int) -> None:
        self._keep(number)
        if not self.lost:
            for rank in self._ranks:
                if rank.worker is not None and self._up:
                    rank.worker.send(DropAdapter(number))

    def _keep(self, number: int, *adapter: AdapterConfig) -> None:
        """Notes what the next start loads."""
        model = self._config.model
        others = (each for each in _numbered(model.adapters) if each.number != number)
        model = msgspec.structs.replace(model, adapters=(*others, *adapter))
        self._config = msgspec.structs.replace(self._config, model=model)

    def submit(self, plan: StepPlan) -> None:
        frame = Packer()
        for rank in self._ranks:
            if rank.worker is not None:
                rank.worker.send(plan, frame)

    def transfer(self, order: Transfer) -> None:
        if self._error is not None:
            return
        self._orders[order.number] = []
        frame = Packer()
        for rank in self._ranks:
            if rank.worker is not None:
                rank.worker.send(order, frame)

    async def result(self) -> StepResult:
        while not self._results:
            if self._error is not None:
                killed = await self._killed()
                await self._end(0)
                raise killed or self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._results.popleft()

    def kill(self) -> None:
        """Kills the ranks, at once."""
        for rank in self._ranks:
            if rank.worker is not None:
                rank.worker.kill()

    async def abort(self) -> None:
        self._lose(WorkerLost("it was given up"))
        await self._end(0)

    async def close(self) -> None:
        await self._end(STOP_GRACE)
        self._placement.close()

    # Called by ranks

    def started(self, worker: WorkerHandle) -> None:
        self._workers.append(worker)

    def answered(self, result: StepResult) -> None:
        self._results.append(result)
        self._wake()

    def transferred(self, rank: _Rank, answer: Transferred) -> None:
        """A rank has done an order; the engine hears of it when all have."""
        answers = self._orders.get(answer.number)
        if rank not in self._ranks or answers is None:
            return  # of an earlier start
        answers.append(answer)
        if len(answers) == len(self._ranks):
            del self._orders[answer.number]
            done, seconds = min(each.done for each in answers), max(each.seconds for each in answers)
            self.on_transferred(Transferred(answer.number, done, sum(each.bytes for each in answers), seconds))

    def progressed(self) -> None:
        # A rank may report progress after the start was given up.
        if self._ranks and self._progress is not None:
            self._progress.share(min(rank.loaded for rank in self._ranks))

    def rank_lost(self, rank: _Rank, error: InflightError) -> None:
        """Marks the group as lost because one rank ended or failed."""
        if rank not in self._ranks:
            return  # a rank of an earlier start
        for other in self._ranks:
            if not other.offer.done():
                other.offer.set_exception(error)
                other.offer.exception()  # marks it as retrieved: only the first failure is awaited
        self._lose(error if isinstance(error, RanksKilled) else WorkerLost(str(error)))

    def _lose(self, error: WorkerLost) -> None:
        self._results.clear()
        self._up = False
        for rank in self._ranks:
            rank.lose_adapters()
        if self._error is None:
            self._error = error
            self.on_lost()
        self._wake()

    async def _killed(self) -> RanksKilled | None:
        """The error of a rank that was killed, if one was. Other ranks fail because of it, maybe before its end is
        known, so this waits a moment."""
        if len(self._ranks) > 1:
            await asyncio.sleep(FAREWELL)
        return next((rank.killed for rank in self._ranks if rank.killed is not None), None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _end(self, grace: float) -> None:
        ranks, self._ranks, self._up = self._ranks, [], False
        placing, self._placing = self._placing, None
        if placing is not None and placing is not asyncio.current_task():
            placing.cancel()
            await asyncio.wait([placing])
        for rank in ranks:  # ends a start that waits for them
            rank.lose_adapters()
            if not rank.offer.done():
                rank.offer.set_exception(StartError("the model was given up while it was being loaded"))
                rank.offer.exception()
        await asyncio.gather(*(self._end_worker(worker, grace) for worker in self._workers))
        await self._placement.release()

    async def _end_worker(self, worker: WorkerHandle, grace: float) -> None:
        await worker.end(grace)
        if worker in self._workers:
            self._workers.remove(worker)


def _numbered(adapters: Sequence[AdapterConfig]) -> list[AdapterConfig]:
    """The first ones have their places for numbers, which stay theirs when one before them goes."""
    return [replace(each, number=each.number or place) for place, each in enumerate(adapters, 1)]


def _smallest(offers: list[ShardOffer]) -> ShardOffer:
    """The capacity of the group: the minimum over all ranks; bytes are summed up."""
    first = offers[0]
    return msgspec.structs.replace(
        first,
        model=msgspec.structs.replace(first.model, weight_bytes=sum(offer.model.weight_bytes for offer in offers)),
        cache=msgspec.structs.replace(
            first.cache,
            num_blocks=min(offer.cache.num_blocks for offer in offers),
            bytes=sum(offer.cache.bytes for offer in offers),
        ),
        max_rows=min(offer.max_rows for offer in offers),
        max_model_len=min(offer.max_model_len for offer in offers),
        states=min((offer.states for offer in offers), key=lambda states: states.slots),
        prompt_cache=first.prompt_cache if all(offer.prompt_cache for offer in offers) else "",
        adapters=tuple(each for each in first.adapters if all(each in offer.adapters for offer in offers)),
        contents=tuple(
            (number, content if all((number, content) in offer.contents for offer in offers) else 0)
            for number, content in first.contents
        ),
    )
