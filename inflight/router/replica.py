"""A replica: one worker process of a servable and the instances that it has."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from inflight.contract import Row, Table, Value
from inflight.errors import InvalidRequest, StartError
from inflight.link import (
    BOARD_BYTES,
    LARGE,
    AnyMessage,
    Arena,
    ArenaReader,
    Blob,
    BoardReader,
    Call,
    CallDone,
    Done,
    Drop,
    Failed,
    Leaving,
    Load,
    Offer,
    Packer,
    Phase,
    Ready,
    Trial,
    Unpacker,
    Work,
    WorkerJob,
    create_file,
    physical_memory,
)
from inflight.place import STOP_GRACE, Launch, WorkerHandle, start_worker
from inflight.router.request import NOBODYS, Instance, Late, SentTogether, Span, spans
from inflight.router.watch import ExecutionWatch

log = logging.getLogger("inflight")

DUMP_GRACE = 0.3
"""Seconds between asking a hung worker for the stacks of its threads and killing it."""


class TrialOverdue(StartError):
    """A trial run of a model on made-up inputs did not end in time."""


class State(enum.Enum):
    """The states of a replica."""

    STARTING = "starting"
    READY = "ready"
    LOST = "lost"  # will be started again
    DEAD = "dead"  # will not


class Owner(Protocol):
    """What a replica reports to. All calls come on the event loop."""

    def on_done(self, replica: Replica, message: Done, values: Unpacker) -> None: ...

    def on_call(self, replica: Replica, message: Call, values: Unpacker) -> None: ...

    def on_lost(self, replica: Replica) -> None: ...

    def execution_limits(self, offer: Offer) -> Mapping[int, float | None]:
        """Seconds that one run may take, by method; None: any time."""
        ...


class Replica:
    """One worker process at a time; `start` replaces a lost one.

    Attributes:
        label: its name in logs and metrics (`device0`, `extra1`).
        starts: number of processes so far.
        outstanding: instances that the worker has, by key, in the order they were sent.
        batches: number of messages that are not completely answered, by method index.
        proven: the worker has answered some work since its last start.
        lost: set when a ready worker is lost; `Keeper` clears it.
        left: the worker said that it was asked to end, so no instance is to blame for its exit.
        killed: the process was ended by a signal from outside. Its instances are hardly to blame, but the system sends
            the same signal when memory is short.
        failures: starts in a row that failed by the worker's own doing.
        late: the run for which the worker was ended because it took too long.
        watch: notices such runs; None until the worker is ready.
        phase: what the worker does while it loads, for messages.
    """

    _next_key = 1

    def __init__(self, label: str, owner: Owner, inbox: Arena, launch: Callable[[int, bool], Launch]) -> None:
        self.label = label
        self._owner = owner
        self._inbox = inbox
        self._launch = launch
        self.starts = 0
        self._worker: WorkerHandle | None = None
        self._reader: ArenaReader | None = None
        self._offered: asyncio.Future[Offer] | None = None
        self._released: list[int] = []  # offsets of outputs that are no longer used; sent to the worker with new work
        self._trial: asyncio.TimerHandle | None = None
        self._trial_seconds: float | None = None
        self.state = State.STARTING
        self.offer: Offer | None = None
        self.outstanding: dict[int, Instance] = {}
        self.batches: dict[int, int] = {}
        self.proven = False
        self.left = False
        self.killed = False
        self.failures = 0
        self.late: Late | None = None
        self.watch: ExecutionWatch | None = None
        self.phase = ""
        self._serving = False
        self.has_device = False
        self.lost = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    async def start(self, job: WorkerJob, timeout: float | None) -> Offer:
        """Starts a process and waits until it has loaded its servable.

        Raises:
            StartError: with the worker's own text, or that it died without one.
            TrialOverdue: a trial run of a model took longer than `job.trial_seconds`.
        """
        self.state = State.STARTING
        self._trial_seconds = job.trial_seconds
        self.proven = self.left = self.killed = False
        self.late = None
        self.phase = "starts a process"
        loop = asyncio.get_running_loop()
        self._offered = loop.create_future()
        self._worker = worker = self._spawn()
        try:
            await worker.connect()
            worker.send(Load(job))
            self.offer = await asyncio.wait_for(asyncio.shield(self._offered), timeout)
        except asyncio.TimeoutError:
            self._offered.cancel()
            await self.end(0)
            raise StartError(
                f"worker {self.label} was not ready within {timeout:g} seconds: it {self.phase}; raise --start-timeout "
                "where that may take so long"
            ) from None
        except OSError as error:
            self._offered.cancel()
            await self.end(0)
            raise StartError(f"cannot connect to worker {self.label}: {error}") from error
        except BaseException:
            self._offered.cancel()
            await self.end(0)
            raise
        finally:
            self._follow_trial(False)
        if self.left or not worker.running:  # it ended right after it was ready
            await self.end(0)
            raise _death(self.label, worker)
        assert self._reader is not None
        self.watch = ExecutionWatch(
            BoardReader(self._reader.peek(BOARD_BYTES)),
            self._owner.execution_limits(self.offer),
            self.outstanding,
            partial(self._hung, worker),
        )
        self.has_device = self.offer.own_models
        self.state = State.READY
        self._serving = True
        return self.offer

    def _spawn(self) -> WorkerHandle:
        """A new process with a new outbox.

        Raises:
            StartError: the system has no process, memory or descriptor left.
        """
        try:
            outbox = Arena(create_file("inflight-outbox", physical_memory()))
        except OSError as error:
            raise StartError(f"cannot make shared memory for worker {self.label}: {error}") from error
        try:
            # A new list for each process: outputs of an earlier process may be released while this one runs, and the
            # same offset in the new outbox may be in use.
            self._released = []
            self._reader = ArenaReader(outbox.fd, self._released.append)
            process = start_worker(self._launch(outbox.fd, self.starts > 0))
        except OSError as error:
            raise StartError(f"cannot start worker {self.label}: {error}") from error
        finally:
            outbox.close()
        self.starts += 1
        return WorkerHandle(f"worker {self.label}", process, self._received, self._ended, self._reader)

    def send(self, method: int, instances: Sequence[Instance]) -> None:
        """Sends instances of one method to the worker, in one message."""
        assert self._worker is not None
        now = asyncio.get_running_loop().time()
        packer = Packer(self._inbox, allocate=False)
        try:
            rows = packer.rows([self._placed(span) for span in spans(instances)])
        except InvalidRequest:
            self.send(method, [instance for instance in instances if _can_travel(instance)])
            return
        if not instances:
            return
        together = SentTogether(len(instances))
        seconds: list[float | None] = []
        some_deadline = False
        first = Replica._next_key
        Replica._next_key += len(instances)
        for key, instance in enumerate(instances, first):
            instance.key = key
            instance.replica = self
            instance.sent_with = together
            self.outstanding[key] = instance
            deadline = instance.request.deadline
            if deadline is None:
                seconds.append(None)
            else:
                some_deadline = True
                seconds.append(deadline - now)
        self.batches[method] = self.batches.get(method, 0) + 1
        frees = self._released[:]
        del self._released[: len(frees)]
        if self.watch is not None and not self.watch.armed:
            self.watch.arm()
        self._worker.send(Work(method, first, rows, seconds if some_deadline else None, frees), packer)

    def take_back(self, key: int) -> Instance:
        """Removes an answered instance from `outstanding` and returns it; `NOBODYS` if the key is unknown."""
        instance = self.outstanding.pop(key, NOBODYS)
        if instance.sent_with is not None:
            instance.replica = None
            instance.sent_with.left -= 1
            if not instance.sent_with.left:
                self.batches[instance.request.method] -= 1
        return instance

    def drop(self, keys: list[int]) -> None:
        if self._worker is not None:
            self._worker.send(Drop(keys))

    def answer_calls(self, message: CallDone, packer: Packer) -> None:
        if self._worker is not None:
            self._worker.send(message, packer)

    def packer(self) -> Packer:
        return Packer(self._inbox, allocate=False)

    async def end(self, grace: float = STOP_GRACE) -> None:
        """Ends the process as `WorkerHandle.end` does."""
        if self._worker is not None:
            await self._worker.end(grace)

    def kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()

    def _placed(self, span: Span) -> Sequence[Row]:
        """The rows, with large values in the shared arena, where a replay finds them again."""
        request, first, last = span
        rows = request.rows
        part = rows if last - first == len(request.instances) else rows[first:last]
        if type(part) is Table and not part.reaches(LARGE):
            return part
        placed = part
        for at, row in enumerate(part):
            new = self._placed_row(row)
            if new is not row:
                placed = list(placed) if placed is part else placed
                placed[at] = new  # type: ignore[index]  # a list
        if placed is not part:
            request.rows = [*rows[:first], *placed, *rows[last:]]
        return placed

    def _placed_row(self, row: Row) -> Row:
        changed: list[Any] | None = None
        for at, value in enumerate(row):
            placed: Value | Blob | None = None
            if isinstance(value, np.ndarray):
                if value.nbytes >= LARGE and self._inbox.offset_of(value) is None:
                    placed = self._inbox.place(value)
            elif isinstance(value, bytes) and len(value) >= LARGE:
                block = self._inbox.place(np.frombuffer(value, np.uint8))
                placed = Blob(block) if block is not None else None
            if placed is not None:
                if changed is None:
                    changed = list(row)
                changed[at] = placed
        return row if changed is None else changed

    def _received(self, message: AnyMessage, values: Unpacker) -> None:
        if isinstance(message, Done):
            self.proven = True
            if self.watch is not None:
                self.watch.answers += 1
            self._owner.on_done(self, message, values)
        elif isinstance(message, Call):
            self._owner.on_call(self, message, values)
        elif isinstance(message, Ready):
            self._settle_start(message.offer)
        elif isinstance(message, Failed):
            self._settle_start(StartError(message.text))
        elif isinstance(message, Leaving):
            self.left = True
            if self.state is State.READY:
                self.state = State.LOST  # no more work; its instances are sent again when it has ended
        elif isinstance(message, Phase):
            self.phase = message.text
        elif isinstance(message, Trial):
            self._follow_trial(message.running)

    def _follow_trial(self, running: bool) -> None:
        """Starts or stops the timer of a trial run, when the worker reports its begin or end."""
        if running:
            self.phase = "runs a model on made-up inputs"
        if self._trial is not None:
            self._trial.cancel()
            self._trial = None
        if running and self._trial_seconds is not None:
            late = TrialOverdue(f"worker {self.label}: a run of a model on made-up inputs did not end in time")
            self._trial = asyncio.get_running_loop().call_later(self._trial_seconds, self._settle_start, late)

    def _settle_start(self, result: Offer | StartError) -> None:
        if self._offered is not None and not self._offered.done():
            if isinstance(result, StartError):
                self._offered.set_exception(result)
            else:
                self._offered.set_result(result)

    def _hung(self, worker: WorkerHandle, late: Late) -> None:
        """Ends a worker whose run takes too long; `on_lost` follows when the process has ended."""
        self.late = late
        self.state = State.LOST
        log.error(
            "worker %s (pid %s) is hung: it %s; where its threads are is written to its log, then it is ended",
            self.label,
            worker.pid,
            f"is at one call for more than {late.seconds:g} seconds"
            if late.keys
            else f"has had work for {late.seconds:g} seconds and runs nothing",
        )
        worker.dump()
        asyncio.get_running_loop().call_later(DUMP_GRACE, worker.kill)

    def _ended(self, worker: WorkerHandle) -> None:
        if worker is not self._worker:
            return  # an earlier process, which could not be killed in time
        self.killed = worker.killed
        self._settle_start(_death(self.label, worker))
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._serving:
            self._serving = False
            if self.state is not State.DEAD:
                self.state = State.LOST
                self._owner.on_lost(self)
                self.lost.set()


def _death(label: str, worker: WorkerHandle) -> StartError:
    return StartError(f"death of one worker: {label} ended with status {worker.status}")


def _can_travel(instance: Instance) -> bool:
    """Whether all values of an instance can be sent; if not, the instance gets its error here."""
    try:
        Packer().row(instance.request.rows[instance.index])
    except InvalidRequest as error:
        instance.settle(error)
        return False
    return True
