"""Runs the only rank of a model on a thread of this process: the executor for scripts, notebooks and tests."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from inflight.config import AdapterConfig
from inflight.contract import ShardJob, ShardOffer, StepPlan, StepResult, Transfer, Transferred
from inflight.device import connect_ranks, open_device
from inflight.engine import Executor
from inflight.errors import StartError, WorkerLost
from inflight.shard import Runner, load_runner
from inflight.startup import aside

T = TypeVar("T")

FAREWELL = 2.0
"""Seconds that a script waits at its end for such a thread. A load that was given up ends with its next weight."""


class _Thread:
    """Calls functions one after the other on a daemon thread. A script that ends waits `FAREWELL` seconds for it: not
    for ever, as with `ThreadPoolExecutor`, because a call may hang in a library; but a moment, because a thread that
    returns from a library after the end of the interpreter aborts the process."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def submit(self, call: Callable[..., T], *given: Any) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, call, given))
        return future

    async def call(self, call: Callable[..., T], *given: Any) -> T:
        return await asyncio.wrap_future(self.submit(call, *given))

    def shutdown(self) -> None:
        """Ends the thread after the calls that were submitted."""
        self._calls.put(None)

    def _end(self) -> None:
        self.shutdown()
        self._thread.join(FAREWELL)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, given = item
            del item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*given))
            except BaseException as error:  # raised to the caller by the future
                future.set_exception(error)
            del future, call, given  # not kept until the next call
        atexit.unregister(self._end)


class LocalExecutor(Executor):
    """Runs one rank on a thread. A step that fails ends the rank, as it ends a worker process; `start` makes a new one.

    A second thread passes answers to the event loop. To wake the loop releases the GIL, and the loop holds it until it
    has handled the answer; for these 0.2 ms the model's thread could not begin its next step.

    Args:
        job: what to load; its `world_size` is 1.
        progress: called on the thread with the share of the weights that is loaded.
    """

    def __init__(self, job: ShardJob, progress: Callable[[float], None] | None = None) -> None:
        if job.world_size != 1:
            raise StartError("several ranks need several processes; use `inflight serve --tensor-parallel`")
        self._job = job
        self._progress = progress
        self._thread = _Thread("model")
        self._courier = _Thread("answers")
        self._runner: Runner | None = None  # gone after a loss: plans behind it do nothing
        self._ended: Runner | None = None  # the same, until its threads are ended
        self._answers: deque[StepResult | WorkerLost] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._given_up = False
        self._late: dict[int, AdapterConfig] = {}  # adapters that were loaded after the first start

    @property
    def lost(self) -> bool:
        return self._runner is None

    async def start(self, num_blocks: int | None = None) -> ShardOffer:
        await self.abort()
        self._answers.clear()
        job = self._job.sized(num_blocks).wearing(tuple(self._late.values()))
        self._runner = self._ended = await self._thread.call(self._load, job)
        return self._runner.offer

    async def load_adapter(self, adapter: AdapterConfig) -> None:
        runner = self._runner
        if runner is None:
            raise WorkerLost("the model is not loaded")
        factors = await aside(lambda: runner.read_adapter(adapter), "adapter")
        await self._thread.call(runner.add_adapter, adapter.number, factors)
        self._late[adapter.number] = adapter

    def drop_adapter(self, number: int) -> None:
        self._late.pop(number, None)
        if self._runner is not None:
            self._thread.submit(self._runner.drop_adapter, number)

    def submit(self, plan: StepPlan) -> None:
        self._thread.submit(self._step, plan, asyncio.get_running_loop())

    def transfer(self, order: Transfer) -> None:
        self._thread.submit(self._transfer, order, asyncio.get_running_loop())

    async def result(self) -> StepResult:
        while not self._answers:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        answer = self._answers.popleft()
        if isinstance(answer, WorkerLost):
            self._answers.append(answer)  # nothing comes after it
            raise answer
        return answer

    async def abort(self) -> None:
        """Waits for the step that is computed, because a thread cannot be killed, and drops its result."""
        self._runner = None
        ended, self._ended = self._ended, None
        if ended is not None:
            await self._thread.call(ended.close, FAREWELL)
        self._answered(WorkerLost("it was given up"))
        for thread in (self._thread, self._courier):  # in this order: no answer is on its way then
            await thread.call(lambda: None)

    async def give_up(self) -> None:
        self._given_up = True  # a load ends with its next weight
        await super().give_up()

    async def close(self) -> None:
        if self._runner is not None:
            await self._thread.call(lambda: None)  # orders to write files, which are behind the steps
        await self.abort()
        self.shutdown()

    def shutdown(self) -> None:
        """Ends the threads after their current call, without waiting for it."""
        self._given_up = True
        for thread in (self._thread, self._courier):
            thread.shutdown()

    def _answered(self, answer: StepResult | WorkerLost) -> None:
        self._answers.append(answer)
        if isinstance(answer, WorkerLost):
            self.on_lost()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # On the thread

    def _step(self, plan: StepPlan, loop: asyncio.AbstractEventLoop) -> None:
        runner = self._runner
        if runner is None:
            return
        answer: StepResult | WorkerLost
        try:
            result = runner.run(plan)
            assert result is not None
            answer = result
        except Exception as error:
            self._runner = None
            answer = WorkerLost(f"{type(error).__name__}: {error}")
        self._courier.submit(loop.call_soon_threadsafe, self._answered, answer)

    def _transfer(self, order: Transfer, loop: asyncio.AbstractEventLoop) -> None:
        runner = self._runner

        def answer(done: Transferred) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._transferred, runner, done)

        if runner is not None:
            runner.transfer(order, answer)

    def _transferred(self, runner: Runner | None, answer: Transferred) -> None:
        if runner is self._runner:
            self.on_transferred(answer)

    def _load(self, job: ShardJob) -> Runner:
        device = open_device(job.model.device_type, job.device_id)
        if job.model.threads:
            device.set_threads(job.model.threads)
        return load_runner(job, connect_ranks(0, 1, "", device, 0.0), device, self._tell)

    def _tell(self, done: float) -> None:
        if self._given_up:
            raise StartError("the model was given up while it was being loaded")
        if self._progress is not None:
            self._progress(done)
