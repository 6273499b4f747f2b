"""The engine's view of the shards: start them, send plans, get results in order."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from inflight.config import AdapterConfig
from inflight.contract import ShardOffer, StepPlan, StepResult, Transfer, Transferred
from inflight.errors import StartError, WorkerLost


class RanksKilled(WorkerLost):
    """A rank was killed from outside: by a person, or by the system when memory is short. This says little about the
    model."""


class Executor(ABC):
    """Runs plans on all ranks of one language model.

    Used from one event loop by one caller. Every rank runs plans in the order of `submit`. After `WorkerLost` the
    executor holds nothing: the next `start` makes ranks with empty batches and caches, whose steps count from 0.

    Attributes:
        on_lost: called on the loop when `lost` becomes true.
        on_transferred: called on the loop with the answer of an order, once all ranks have done it.
        elastic: a start may wait for a machine with room for as long as it takes.
    """

    elastic = False
    on_lost: Callable[[], None] = staticmethod(lambda: None)
    on_transferred: Callable[[Transferred], None] = staticmethod(lambda answer: None)
    _begun: asyncio.Task[ShardOffer] | None = None

    def begin(self) -> None:
        """Begins the first start before there is an engine, so that ranks load while the tokenizer is read. The engine
        takes the start over with `first`; without an engine, call `give_up`."""
        self._begun = asyncio.ensure_future(self.start())

    async def first(self) -> ShardOffer:
        """The first start: waits for the one that `begin` began, or starts the ranks. Raises as `start`."""
        begun, self._begun = self._begun, None
        return await (self.start() if begun is None else begun)

    async def give_up(self) -> None:
        """Ends a start that `begin` began, and closes."""
        begun, self._begun = self._begun, None
        if begun is not None:
            await asyncio.sleep(0)  # lets the task run to its first wait
        await self.close()
        if begun is not None:  # not cancelled: `close` ends it, and a second cancellation would interrupt its clean-up
            await asyncio.wait([begun])
            if not begun.cancelled():
                begun.exception()

    @abstractmethod
    async def start(self, num_blocks: int | None = None) -> ShardOffer:
        """Starts (again) every rank and waits until all are loaded and warmed up.

        Args:
            num_blocks: blocks of the cache that an earlier start decided on; fewer where memory has become short.

        Returns:
            The smallest capacity over the ranks.

        Raises:
            StartError: a rank said why it cannot load; nothing is left running.
            RanksKilled: a rank was killed while it loaded; nothing is left running.
        """

    @property
    @abstractmethod
    def lost(self) -> bool:
        """A rank died or failed since the start: plans do nothing, and `result` raises. False after the next start."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Sends a plan to every rank; never blocks. After a loss it does nothing, and `result` raises."""

    def transfer(self, order: Transfer) -> None:
        """Sends an order to every rank, which does it behind the plans that were submitted before; never blocks. Only
        where the offer names a folder. After a loss it does nothing, and there is no answer."""
        raise NotImplementedError("these ranks keep no files")

    @abstractmethod
    async def result(self) -> StepResult:
        """Waits for the result of the oldest plan that is not answered yet.

        Raises:
            WorkerLost: a rank died or failed; plans in flight will never be answered.
            RanksKilled: as WorkerLost, for a rank that was killed from outside.
        """

    async def load_adapter(self, adapter: AdapterConfig) -> None:
        """Makes an adapter known to every rank by its number; plans behind this may name it. Later starts load it too.

        Raises:
            StartError: a rank said why it cannot load it.
            WorkerLost: the ranks are not up; their next start loads it.
        """
        raise StartError(f"adapter '{adapter.name}': these ranks take no adapters while they serve")

    def drop_adapter(self, number: int) -> None:
        """Lets every rank forget an adapter, which no plan from now on gives to a row; later starts do without it."""
        return

    @abstractmethod
    async def abort(self) -> None:
        """Kills every rank, because a step takes too long. A pending `result` raises WorkerLost."""

    @abstractmethod
    async def close(self) -> None:
        """Asks every rank to end, kills those that do not, and waits until none runs."""
