"""A replica: one worker process of a servable and the instances that it has."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec
import numpy as np

from inflight.contract import Row, Table, Value
from inflight.errors import InvalidRequest, StartError, WorkerLost
from inflight.link import (
    BOARD_BYTES,
    LARGE,
    MAX_VALUES,
    Admit,
    AnyMessage,
    Arena,
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
    Running,
    ToldBoard,
    Trial,
    Unpacker,
    Work,
    WorkerJob,
    frames,
    parts,
    row_bytes,
)
from inflight.place import STOP_GRACE, PlacedWorker, WorkerHandle, WorkerPlace
from inflight.router.request import NOBODYS, Instance, Late, SentTogether, Span, spans
from inflight.router.watch import ExecutionWatch

log = logging.getLogger("inflight")

DUMP_GRACE = 0.3
"""Seconds between asking a hung worker for the stacks of its threads and killing it."""


ADMIT_SECONDS = 10.0
"""Seconds in which the worker of a distributed servable must leave its address, or take it again."""


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
    """One worker process at a time; `place` and `start` replace a lost one.

    Args:
        inbox: shared memory that the worker reads, where it is on this machine.
        place: where it runs.

    Attributes:
        label: its name in logs and metrics (`device0`, `extra1`).
        elastic: its starts may wait for a machine with room.
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

    def __init__(self, label: str, owner: Owner, inbox: Arena, place: WorkerPlace) -> None:
        self.label = label
        self._owner = owner
        self._place = place
        self.elastic = place.elastic
        self._inbox = None if place.elastic else inbox  # another machine has no memory with this one
        self.starts = 0
        self._worker: WorkerHandle | None = None
        self._placed: PlacedWorker | None = None
        self._told: ToldBoard | None = None
        self._admitted: asyncio.Future[str] | None = None
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
        """On its machine."""
        return self._worker.pid if self._worker is not None else None

    @property
    def host(self) -> str:
        """The address of its machine; empty: this one."""
        return self._placed.host if self._placed is not None else ""

    @property
    def name(self) -> str:
        """Its name in messages, with its machine."""
        return f"{self.label} on {self.host}" if self.host else self.label

    async def place(self) -> None:
        """Starts a process, on a cluster as soon as there is room. `start` follows at once.

        Raises:
            StartError: it cannot be started; where its machine was lost meanwhile, `killed` is set.
        """
        self.state = State.STARTING
        self.proven = self.left = self.killed = False
        self.late = None
        self._placed = None
        self.phase = "starts a process"
        # A new list for each process: outputs of an earlier process may be released while this one runs, and the same
        # offset in the new outbox may be in use.
        self._released = released = list[int]()
        try:
            self._placed = placed = await self._place.start(self.starts > 0, released.append)
        except WorkerLost as error:
            self.killed = True
            raise StartError(str(error)) from None
        self.starts += 1
        self._worker = WorkerHandle(f"worker {self.name}", placed.process, self._received, self._ended, placed.reader)

    async def start(self, job: WorkerJob, timeout: float | None) -> Offer:
        """Waits until the process has loaded its servable.

        Raises:
            StartError: with the worker's own text, or that it died without one.
            TrialOverdue: a trial run of a model took longer than `job.trial_seconds`.
        """
        assert self._worker is not None
        worker = self._worker
        self._trial_seconds = job.trial_seconds
        self._offered = asyncio.get_running_loop().create_future()
        try:
            await worker.connect()
            worker.send(Load(self._fitted(job)))
            self.offer = await asyncio.wait_for(asyncio.shield(self._offered), timeout)
        except asyncio.TimeoutError:
            self._offered.cancel()
            await self.end(0)
            raise StartError(
                f"worker {self.name} was not ready within {timeout:g} seconds: it {self.phase}; raise --start-timeout "
                "where that may take so long"
            ) from None
        except OSError as error:
            self._offered.cancel()
            await self.end(0)
            raise StartError(f"cannot connect to worker {self.name}: {error}") from error
        except BaseException:
            self._offered.cancel()
            await self.end(0)
            raise
        finally:
            self._follow_trial(False)
        if self.left or not worker.running:  # it ended right after it was ready
            await self.end(0)
            raise _death(self.name, worker)
        self.watch = ExecutionWatch(
            self._board(),
            self._owner.execution_limits(self.offer),
            self.outstanding,
            partial(self._hung, worker),
        )
        self.has_device = self.offer.own_models
        self.state = State.READY
        self._serving = True
        return self.offer

    def _fitted(self, job: WorkerJob) -> WorkerJob:
        """The job for the worker's machine: a cluster shows a process its own devices only."""
        if not self.host:
            return job
        assert self._placed is not None
        device = job.device_id if job.device_id is None else 0
        return msgspec.structs.replace(job, threads=self._placed.threads, device_id=device)

    def _board(self) -> BoardReader | ToldBoard:
        assert self._placed is not None
        if self._placed.reader is not None:
            return BoardReader(self._placed.reader.peek(BOARD_BYTES))
        self._told = ToldBoard()
        return self._told

    def send(self, method: int, instances: Sequence[Instance]) -> None:
        """Sends instances of one method to the worker: in one message, or in several where all values travel in them
        and are large."""
        if self._inbox is not None:
            self._send(method, instances)
            return
        for few in _framed(instances):
            self._send(method, few)

    def _send(self, method: int, instances: Sequence[Instance]) -> None:
        assert self._worker is not None
        now = asyncio.get_running_loop().time()
        packer = self.packer()
        try:
            rows = packer.rows([self._rows(span) for span in spans(instances)])
        except InvalidRequest:
            self._send(method, [instance for instance in instances if _can_travel(instance)])
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

    async def admit(self, agents: bool) -> None:
        """Lets agents come to the worker of a distributed servable, or makes it leave its address to another group.

        Raises:
            StartError: it cannot do so, or does not answer.
        """
        if self._worker is None or self.state is not State.READY:
            raise StartError(f"worker {self.name} is being started again; try again when its agents have come")
        self._admitted = asyncio.get_running_loop().create_future()
        self._worker.send(Admit(agents))
        try:
            text = await asyncio.wait_for(self._admitted, ADMIT_SECONDS)
        except asyncio.TimeoutError:
            text = f"worker {self.name} does not answer"
        if text:
            raise StartError(text)

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

    def _rows(self, span: Span) -> Sequence[Row]:
        """The rows, with large values in the shared arena, if there is one, where a replay finds them again."""
        request, first, last = span
        rows = request.rows
        part = rows if last - first == len(request.instances) else rows[first:last]
        if self._inbox is None or (type(part) is Table and not part.reaches(LARGE)):
            return part
        placed = part
        for at, row in enumerate(part):
            new = _in_arena(self._inbox, row)
            if new is not row:
                placed = list(placed) if placed is part else placed
                placed[at] = new  # type: ignore[index]  # a list
        if placed is not part:
            request.rows = [*rows[:first], *placed, *rows[last:]]
        return placed

    def _received(self, message: AnyMessage, values: Unpacker) -> None:
        if isinstance(message, Done):
            self.proven = True
            if self.watch is not None:
                self.watch.answers += 1
            self._owner.on_done(self, message, values)
        elif isinstance(message, Call):
            self._owner.on_call(self, message, values)
        elif isinstance(message, Admit):
            if self._admitted is not None and not self._admitted.done():
                self._admitted.set_result(message.text)
        elif isinstance(message, Running):
            if self._told is not None:
                self._told.tell(message.runs)
        elif isinstance(message, Ready):
            self._settle_start(message.offer)
        elif isinstance(message, Failed):
            self._settle_start(StartError(f"on machine {self.host}: {message.text}" if self.host else message.text))
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
            late = TrialOverdue(f"worker {self.name}: a run of a model on made-up inputs did not end in time")
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
            self.name,
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
        self._settle_start(_death(self.name, worker))
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        if self._placed is not None and self._placed.reader is not None:
            self._placed.reader.close()
        self._place.release()
        if self._serving:
            self._serving = False
            if self.state is not State.DEAD:
                self.state = State.LOST
                self._owner.on_lost(self)
                self.lost.set()


def _in_arena(arena: Arena, row: Row) -> Row:
    """The row with its large values in the arena, as far as there is room."""
    changed: list[Any] | None = None
    for at, value in enumerate(row):
        placed: Value | Blob | None = None
        if isinstance(value, np.ndarray):
            if value.nbytes >= LARGE and arena.offset_of(value) is None:
                placed = arena.place(value)
        elif isinstance(value, bytes) and len(value) >= LARGE:
            block = arena.place(np.frombuffer(value, np.uint8))
            placed = Blob(block) if block is not None else None
        if placed is not None:
            if changed is None:
                changed = list(row)
            changed[at] = placed
    return row if changed is None else changed


def _framed(instances: Sequence[Instance]) -> Iterator[Sequence[Instance]]:
    """The instances in groups that fit a frame; one that fits none gets its error here."""

    def pieces() -> Iterator[tuple[Sequence[Instance], int]]:
        rows = [(request.rows[first:last], last - first) for request, first, last in spans(instances)]
        at = 0
        for part, count in rows:  # which were taken first, since an error may end a request
            mine = instances[at : at + count]
            at += count
            for begin, end, size in parts(part):
                if size > MAX_VALUES:
                    mine[begin].settle(_too_large(row_bytes(part[begin])))
                else:
                    yield mine[begin:end], size

    for some in frames(pieces()):
        yield [instance for piece in some for instance in piece]


def _too_large(size: int) -> InvalidRequest:
    return InvalidRequest(
        f"an instance of {size} bytes cannot be sent to a worker on another machine, at most {MAX_VALUES} can; divide "
        "it, or serve the model without --cluster"
    )


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
