"""The engine's view of the shards: start them, send plans, get results in order."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from inflight.contract import ShardOffer, StepPlan, StepResult
from inflight.errors import WorkerLost


class RanksKilled(WorkerLost):
    """Somebody else ended a rank: a person, or the system where memory is short. It says little about the model."""


class Executor(ABC):
    """All ranks of one language model as one thing.

    Used from one event loop by one caller. Plans run in the order of `submit` on every rank. After `WorkerLost` the
    executor holds nothing: `start` again gives fresh ranks with empty batches and caches, whose steps count from 0.

    Attributes:
        on_lost: called on the loop when `lost` becomes true, whether or not anybody waits for a result.
    """

    on_lost: Callable[[], None] = staticmethod(lambda: None)
    _begun: asyncio.Task[ShardOffer] | None = None

    def begin(self) -> None:
        """Begins the first start ahead of the engine, which takes it (`first`): ranks load while the tokenizer is read.
        Who begins and makes no engine calls `give_up`."""
        self._begun = asyncio.ensure_future(self.start())

    async def first(self) -> ShardOffer:
        """The first start: the one that was begun, where one was. As `start`."""
        begun, self._begun = self._begun, None
        return await (self.start() if begun is None else begun)

    async def give_up(self) -> None:
        """Ends what `begin` has begun, and closes."""
        begun, self._begun = self._begun, None
        if begun is not None:
            await asyncio.sleep(0)  # it may not have begun yet
        await self.close()
        if begun is not None:  # a cancel beside another one would leave parts of it behind
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
        """Sends a plan to every rank; never blocks. After a loss it does nothing: `result` tells."""

    @abstractmethod
    async def result(self) -> StepResult:
        """The result of the oldest plan not answered yet.

        Raises:
            WorkerLost: a rank died or failed; plans in flight will never be answered. RanksKilled where that is so.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Ends every rank at once: for a step that takes too long. Results waited for raise WorkerLost."""

    @abstractmethod
    async def close(self) -> None:
        """Ends every rank in good order; nothing is left running."""
