"""A worker process that is one rank of a language model."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from inflight import log
from inflight.config import AdapterConfig
from inflight.contract import ShardJob, StepPlan, Transfer, Transferred
from inflight.early import DUMP
from inflight.link import (
    AdapterReady,
    DropAdapter,
    Failed,
    Leaving,
    LoadAdapter,
    LoadShard,
    Progress,
    SecureSocket,
    ShardReady,
    Stop,
    WorkerChannel,
)
from inflight.startup import failed_load, settle
from inflight.worker.ends import ORPHANED, kill_group

if TYPE_CHECKING:
    from inflight.shard import Runner

CONNECT_TIMEOUT = 600.0
"""Seconds that ranks wait for each other: the slowest may still read its weights from a cold disk."""


WRITING_GRACE = 0.8
"""Seconds in which the prompt cache may write what it was told to, when the server stops this rank."""


def run_rank(sock: socket.socket | SecureSocket) -> int:
    """A rank's life. Returns the exit status.

    Args:
        sock: this end of the connection to the server.
    """
    with contextlib.suppress(ValueError):  # the server has reported it already; a rank goes on with the defaults
        log.configure(os.environ)
    channel = WorkerChannel(sock)

    def leave() -> None:
        channel.send(Leaving())
        kill_group()

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted a holder of the locks that sending takes.
        threading.Thread(target=leave, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    faulthandler.register(DUMP)  # written by C code at once, whoever holds the interpreter's lock
    with contextlib.suppress(ImportError):  # the code that needs the missing package reports it
        import inflight.device
        import inflight.shard  # noqa: F401  # imported while the server prepares the job
    received = channel.receive()
    if received is None or not isinstance(received[0], LoadShard):
        return 1
    return _run_shard(channel, received[0])


def _run_shard(channel: WorkerChannel, message: LoadShard) -> int:
    """Loads the model and runs plans until the server stops this rank. Returns the exit status."""
    job = message.job
    plans: queue.SimpleQueue[_Work] = queue.SimpleQueue()
    _read(channel, plans)
    try:
        runner = _load(channel, job)
    except Exception as error:  # back ends may raise anything; the server reports it
        text = str(failed_load("the model", error, job.model.model_dir))
        return 1 if channel.send(Failed(_one_line(text))) else ORPHANED
    channel.send(ShardReady(runner.offer))
    settle()

    def transferred(answer: Transferred) -> None:
        channel.send(answer)

    adapters = _Adapters(channel, runner, plans)
    while (plan := plans.get()) is not None:
        if isinstance(plan, Transfer):
            runner.transfer(plan, transferred)
            continue
        if not isinstance(plan, StepPlan):
            adapters.take(plan)
            continue
        try:
            result = runner.run(plan)
        except Exception as error:
            print(f"step {plan.step} failed on rank {job.rank}: {error!r}", file=sys.stderr, flush=True)
            channel.send(Failed(_one_line(f"rank {job.rank}: {type(error).__name__}: {error}")))
            return 1
        if result is not None and not channel.send(result):
            return ORPHANED
    runner.close(WRITING_GRACE)
    return 0


def _read(channel: WorkerChannel, plans: queue.SimpleQueue[_Work]) -> None:
    """Reads the channel in a thread of its own. The end of the server ends the process, in the middle of a step too."""

    def read() -> None:
        while True:
            received = channel.receive()
            if received is None:
                os._exit(1)
            message, _ = received
            if isinstance(message, (StepPlan, Transfer, LoadAdapter, DropAdapter)):
                plans.put(message)
            elif isinstance(message, Stop):
                plans.put(None)
                return

    threading.Thread(target=read, name="channel", daemon=True).start()


class _Factors(NamedTuple):
    """What was read of an adapter."""

    number: int
    factors: Any


_Work: TypeAlias = "StepPlan | Transfer | LoadAdapter | DropAdapter | _Factors | None"


class _Adapters:
    """The adapters that come and go while a rank runs plans. Each is read on a thread of its own, beside the plans."""

    def __init__(self, channel: WorkerChannel, runner: Runner, work: queue.SimpleQueue[_Work]) -> None:
        self._channel = channel
        self._runner = runner
        self._work = work
        self._wanted: set[int] = set()  # numbers of those that were not dropped since

    def take(self, work: LoadAdapter | DropAdapter | _Factors) -> None:
        """Does what stood between two plans."""
        if isinstance(work, LoadAdapter):
            self._wanted.add(work.adapter.number)
            threading.Thread(target=self._read, args=(work.adapter,), name="adapter", daemon=True).start()
        elif isinstance(work, DropAdapter):
            self._wanted.discard(work.number)
            self._runner.drop_adapter(work.number)
        elif work.number in self._wanted:  # else it was given up while it was read
            self._runner.add_adapter(work.number, work.factors)
            self._channel.send(AdapterReady(work.number))

    def _read(self, adapter: AdapterConfig) -> None:
        try:
            factors = self._runner.read_adapter(adapter)
        except Exception as error:  # files may hold anything; the server reports it
            text = str(failed_load(f"the adapter '{adapter.name}'", error, adapter.folder))
            self._channel.send(AdapterReady(adapter.number, _one_line(text)))
        else:
            self._work.put(_Factors(adapter.number, factors))


def _load(channel: WorkerChannel, job: ShardJob) -> Runner:
    # torch is imported here, in the worker, and nowhere on the server's side.
    from inflight.device import connect_ranks, open_device
    from inflight.shard import load_runner

    job = job.completed(os.environ)
    device = open_device(job.model.device_type, job.device_id)
    if job.processors and device.type == "cpu":
        os.sched_setaffinity(0, job.processors)  # threads that are started from here on inherit it
    if job.model.threads:
        device.set_threads(job.model.threads)
    ranks = connect_ranks(job.rank, job.world_size, job.rendezvous, device, CONNECT_TIMEOUT)

    def progress(done: float) -> None:
        channel.send(Progress(done))

    return load_runner(job, ranks, device, progress)


def _one_line(text: str) -> str:
    return text.encode(errors="replace").decode()
