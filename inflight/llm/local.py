"""The shards of one model inside this process: the engine's executor for scripts, notebooks and tests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from inflight.device import connect_ranks, open_device
from inflight.engine import Executor
from inflight.errors import StartError, WorkerLost
from inflight.plan import ShardJob, ShardOffer, StepPlan, StepResult
from inflight.shard import Runner, load_runner


class LocalExecutor(Executor):
    """One rank on a thread. A step that fails ends it, as it ends a worker process; `start` makes a new one.

    Args:
        job: what to load; `world_size` 1.
        progress: called with the share of the weights that is loaded, on the thread.
    """

    def __init__(self, job: ShardJob, progress: Callable[[float], None] | None = None) -> None:
        if job.world_size != 1:
            raise StartError("several ranks need several processes; use `inflight serve --tensor-parallel`")
        self._job = job
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, "model")
        self._runner: Runner | None = None
        self._results: deque[asyncio.Future[StepResult | None]] = deque()

    async def start(self) -> ShardOffer:
        self._runner = None
        self._results.clear()
        self._runner = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        return self._runner.offer

    def submit(self, plan: StepPlan) -> None:
        assert self._runner is not None
        loop = asyncio.get_running_loop()
        self._results.append(loop.run_in_executor(self._thread, self._runner.run, plan))

    async def result(self) -> StepResult:
        future = self._results.popleft()
        try:
            result = await future
        except Exception as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from error
        assert result is not None
        return result

    async def abort(self) -> None:
        """A thread cannot be ended: what it computes is awaited and forgotten."""
        await asyncio.gather(*self._results, return_exceptions=True)
        self._results.clear()

    async def close(self) -> None:
        await self.abort()
        self._runner = None
        self._thread.shutdown(wait=False)

    def _load(self) -> Runner:
        device = open_device(self._job.device_type, self._job.device_id)
        if self._job.threads:
            device.set_threads(self._job.threads)
        return load_runner(self._job, connect_ranks(0, 1, "", device, 0.0), device, self._progress)
