"""The engine's view of the shards: start them, send plans, get results in order."""

from __future__ import annotations

from abc import ABC, abstractmethod

from inflight.plan import ShardOffer, StepPlan, StepResult


class Executor(ABC):
    """All ranks of one language model as one thing.

    Used from one event loop by one caller. Plans run in the order of `submit` on every rank. After `WorkerLost` the
    executor holds nothing: `start` again gives fresh ranks with empty batches and caches, whose steps count from 0.
    """

    @abstractmethod
    async def start(self) -> ShardOffer:
        """Starts (again) every rank and waits until all are loaded and warmed up.

        Returns:
            The smallest capacity over the ranks.

        Raises:
            StartError: a rank failed, with its text; nothing is left running.
        """

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Sends a plan to every rank; never blocks. After a loss it does nothing: `result` tells."""

    @abstractmethod
    async def result(self) -> StepResult:
        """The result of the oldest plan not answered yet.

        Raises:
            WorkerLost: a rank died or failed; plans in flight will never be answered.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Ends every rank at once: for a step that takes too long. Results waited for raise WorkerLost."""

    @abstractmethod
    async def close(self) -> None:
        """Ends every rank in good order; nothing is left running."""
