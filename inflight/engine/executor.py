"""The engine's view of the shards: start them, send plans, get results in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from inflight.errors import WorkerLost
from inflight.plan import ShardOffer, StepPlan, StepResult


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
