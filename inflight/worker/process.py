"""A worker process: loads one servable, answers a stream of work, ends with its server."""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from inflight import log
from inflight.contract import Outcome, Row, Table, Value
from inflight.errors import InflightError, InvalidRequest, StartError, error_from_wire
from inflight.link import (
    BOARD_BYTES,
    Admit,
    Arena,
    ArenaReader,
    Board,
    Call,
    CallDone,
    CallItem,
    CallOutcome,
    Done,
    Drop,
    Failed,
    Joined,
    Leaving,
    Load,
    Packer,
    Phase,
    Ready,
    StageRuns,
    Stop,
    Trial,
    Unpacker,
    WireError,
    Work,
    WorkerChannel,
    WorkerJob,
)
from inflight.pipeline import Job, Pipeline, Submission
from inflight.place import DUMP
from inflight.servable import install_model_caller
from inflight.startup import failed_load, settle
from inflight.worker.elsewhere import RunsTeller, framed, settle_in
from inflight.worker.ends import ORPHANED, kill_group
from inflight.worker.load import Hooks, Loaded, load, offer
from inflight.worker.remote import RemoteModel

if TYPE_CHECKING:
    from inflight.distributed import Loss, RankGroup

LINGER = 3.0
"""Seconds that running user code has to end once the server is gone; then the process group is killed."""

ANSWER_SECONDS = 0.3
"""Seconds between the loss of a distributed model's rank and this worker's end, for the batch that failed by it."""


class Worker:
    """One servable in one process.

    Threads: the main thread runs Python stages; one thread reads the channel; each model has its own. Outcomes
    are collected under a lock and sent by whichever thread finished a batch.
    """

    def __init__(self, channel: WorkerChannel, outbox: Arena | None) -> None:
        """Args: outbox: None: the server is on another machine, and all values travel in frames."""
        self._channel = channel
        self._outbox = outbox
        memory = memoryview(bytearray(BOARD_BYTES)) if outbox is None else outbox.allocate(BOARD_BYTES)
        self._board = Board(memory)  # the outbox's first block, where the server looks for it
        self._teller = RunsTeller(channel, memory) if outbox is None and memory is not None else None
        self._lock = threading.Lock()
        self._done: list[tuple[Sequence[int], Sequence[Outcome]]] = []
        self._stats: list[StageRuns] = []
        self._submissions: dict[int, Submission] = {}  # by their first key
        self._pipeline: Pipeline | None = None
        self._ranks: RankGroup | None = None
        self.orphaned = False
        self._replays = False
        self._ending = False
        self._timed = log.LOGGER.isEnabledFor(logging.INFO)
        self._reader: threading.Thread | None = None
        self._reading = os.pipe()  # hangs up when the channel's thread has ended

    def listen(self) -> None:
        """Starts to read the channel, so that the end of the server is noticed while user code loads, too."""
        self._reader = threading.Thread(target=self._read, name="channel", daemon=True)
        self._reader.start()

    def start(self, job: WorkerJob) -> None:
        """Loads the servable and tells the server that it is ready."""
        self._replays = job.ranks is not None and job.ranks.replay
        hooks = Hooks(
            self._send_call, self._trial, self._phase, lambda: self._ending, self._ranks_lost, self._ranks_gathered
        )
        loaded = load(job, hooks)
        pipeline = Pipeline(loaded.spec, loaded.ports, self._measure, self._flush, self._board)
        self._pipeline = pipeline
        install_model_caller(self._call_model, lambda key: _counts(loaded, key))
        offered = offer(loaded, pipeline, job.own_models)
        self._methods = [*loaded.spec.methods.values(), *(pipeline.hidden.values() if job.own_models else ())]
        settle()
        self._channel.send(Ready(offered))
        print(
            f"Serving: Start servable success, servable directory: '{job.directory}', servable name: '{job.name}', "
            f"version number: {loaded.version}",
            flush=True,
        )

    def _phase(self, text: str) -> None:
        self._channel.send(Phase(text))

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """Announces a run that may never end: the server ends this process if it takes too long."""
        self._channel.send(Trial(True))
        try:
            yield
        finally:
            self._channel.send(Trial(False))

    def _ranks_lost(self, loss: Loss) -> None:
        """Ends this process, because its model has lost a rank."""
        if self._replays:
            # As the rank ended, so that the server blames the batch if nobody else is to blame.
            log.LOGGER.error("this worker ends, its batches are run again by the next one")
            os.kill(os.getpid(), signal.SIGKILL if loss.outside else signal.SIGABRT)
        time.sleep(ANSWER_SECONDS)  # the batch that failed is answered first
        self.leave()

    def _ranks_gathered(self, ranks: RankGroup) -> None:
        self._ranks = ranks

    def _admit(self, agents: bool) -> None:
        """Lets agents come to a distributed model, or not, and says so."""
        text = ""
        try:
            if self._ranks is not None:
                self._ranks.admit(agents)
        except StartError as error:
            text = str(error)
        self._channel.send(Admit(agents, text))

    def serve(self) -> None:
        """Runs until the server stops this worker or is gone."""
        assert self._pipeline is not None
        if self._pipeline.only_model is None:
            self._pipeline.run_functions()
        else:
            self._watch()

    def _watch(self) -> None:
        """Waits while the channel's thread runs the model; notices the end of the server in the middle of a run."""
        poll = select.poll()
        # Hang-ups of a socket pair are always reported, those of a connection when they are asked for.
        poll.register(self._channel, getattr(select, "POLLRDHUP", 0))
        poll.register(self._reading[0], 0)
        events = poll.poll()
        if all(fd != self._reading[0] for fd, _ in events):
            self.orphaned = True
            self._end()
        assert self._reader is not None
        self._reader.join()

    def leave(self) -> None:
        """Tells the server that this process was asked to end, and ends."""
        self._channel.send(Leaving())
        if self._pipeline is None:  # it has no instances yet, and a load may take minutes
            kill_group()
        self._end()

    def _end(self) -> None:
        self._ending = True
        if self._pipeline is not None:
            self._pipeline.close()
            if self._pipeline.only_model is not None and threading.current_thread() is not self._reader:
                self._channel.stop_reading()
        killer = threading.Timer(LINGER, kill_group)
        killer.daemon = True
        killer.start()

    def _read(self) -> None:
        try:
            self._read_messages()
            self._end()
        finally:
            os.close(self._reading[1])

    def _read_messages(self) -> None:
        while True:
            if not self._run_model():
                break
            received = self._channel.receive()
            if received is None:
                if not self._ending:  # else `_watch` may have said so already
                    self.orphaned = True
                break
            message, values = received
            if isinstance(message, Work):
                self._take(message, values)
            elif isinstance(message, CallDone):
                RemoteModel.answered([(item.number, _outcome(item, values)) for item in message.items])
            elif isinstance(message, Drop):
                self._drop(message.ids)
            elif isinstance(message, Admit):
                self._admit(message.agents)
            elif isinstance(message, Stop):
                break

    def _run_model(self) -> bool:
        """If the servable is one model: runs its batches until there is a message to read. False: the worker ends."""
        model = self._pipeline.only_model if self._pipeline is not None else None
        if model is None:
            return True
        while not self._channel.ready():
            if self._ending:
                return False
            ran, due = model.run_waiting()
            if not ran and self._channel.ready(due):
                return True
        return True

    def _take(self, work: Work, values: Unpacker) -> None:
        if work.frees and self._outbox is not None:
            with self._lock:
                for offset in work.frees:
                    self._outbox.free(offset)
        now = time.monotonic()
        rows = values.rows(work.rows)
        keys = range(work.first, work.first + len(rows))
        deadlines = work.seconds and [None if seconds is None else now + seconds for seconds in work.seconds]
        submission = Submission(self._methods[work.method], keys, self._finish, deadlines, now)
        with self._lock:
            self._submissions[work.first] = submission
        if self._teller is not None:
            self._teller.begin()
        assert self._pipeline is not None
        self._pipeline.submit([Job(submission, keys, [rows])])

    def _drop(self, keys: Sequence[int]) -> None:
        with self._lock:
            for key in keys:
                for submission in self._submissions.values():
                    if key in submission.keys:
                        submission.dropped.add(key)

    def _finish(self, submission: Submission, keys: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        if self._timed:  # scripts written for MindSpore Serving search the log for this line
            for _ in keys:
                log.info("WorkerRequestHandle Time Cost # %.3f ms", (time.monotonic() - submission.arrived) * 1000)
        with self._lock:
            self._done.append((keys, outcomes))
            submission.left -= len(keys)
            if not submission.left:
                del self._submissions[submission.keys.start]
                if self._teller is not None and not self._submissions:
                    self._teller.end()

    def _measure(self, method: str, stage: str, size: int, seconds: float, count: int) -> None:
        with self._lock:
            self._stats.append(StageRuns(method, stage, size, seconds, count))

    def _flush(self) -> None:
        with self._lock:
            done, self._done = self._done, []
            stats, self._stats = self._stats, []
            if not done:
                self._stats = stats + self._stats
                return
            packed = []
            for some in [done] if self._outbox is not None else framed(done):
                packer = Packer(self._outbox)
                packed.append((_pack(packer, some, stats), packer))
                stats = []
        for message, packer in packed:
            self._channel.send(message, packer)

    def _send_call(self, model: str, subgraph: int, items: list[tuple[int, list[object], int]]) -> None:
        with self._lock:
            packer = Packer(self._outbox)
            packed = [CallItem(number, packer.row(row), key) for number, row, key in items]
        self._channel.send(Call(model, subgraph, packed), packer)

    def _call_model(self, key: str, subgraph: int, rows: list[tuple[Value, ...]]) -> list[tuple[Value, ...]]:
        assert self._pipeline is not None
        results: list[tuple[Value, ...]] = []
        for outcome in self._pipeline.call(key, subgraph, rows):
            if isinstance(outcome, InflightError):
                raise outcome
            results.append(tuple(outcome))
        return results


def _pack(packer: Packer, done: Sequence[tuple[Sequence[int], Sequence[Outcome]]], stats: list[StageRuns]) -> Done:
    ids: list[int] = []
    parts: list[Sequence[Row]] = []
    errors: list[WireError] = []
    for keys, outcomes in done:
        if type(outcomes) is Table:
            ids += keys
            parts.append(outcomes)
            continue
        rows: list[Row] = []
        for key, outcome in zip(keys, outcomes):
            if isinstance(outcome, InflightError):
                errors.append(WireError(key, type(outcome).__name__, _sendable(str(outcome))))
            else:
                ids.append(key)
                rows.append(outcome)
        parts.append(rows)
    try:
        return Done(ids, packer.rows(parts), errors, stats)
    except InvalidRequest:  # some row has a value that cannot travel: find out which
        checked = [(keys, [_checked(outcome) for outcome in outcomes]) for keys, outcomes in done]
        return _pack(packer, checked, stats)


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, or why it cannot travel."""
    if not isinstance(outcome, InflightError):
        try:
            Packer().row(outcome)
        except InvalidRequest as error:
            return error
    return outcome


def _sendable(text: str) -> str:
    """The text with characters replaced that UTF-8 does not have: user code may put any text into an error."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _outcome(item: CallOutcome, values: Unpacker) -> Outcome:
    return values.row(item.row) if item.row is not None else error_from_wire(item.kind, item.text)


def _counts(loaded: Loaded, key: str) -> tuple[tuple[int, int], ...] | None:
    port = loaded.ports.get(key)
    if port is None:
        return None
    # A model without declared inputs takes any number of them.
    return tuple((inputs or -1, outputs) for inputs, outputs in port.counts)


def run(fd: int, inbox: int, outbox: int, own_log: bool = False) -> int:
    """The worker's life. Returns the exit status.

    Args:
        fd: this end of the socket pair to the server.
        inbox: file of the arena that the server writes.
        outbox: file of the arena that this worker writes.
        own_log: its output goes to a file of its own, so errors that the server reports are written there as well.
    """
    return _live(WorkerChannel(socket.socket(fileno=fd), ArenaReader(inbox)), Arena(outbox), own_log)


def run_invited(sock: Joined) -> int:
    """As `run`, on another machine than the server. Args: sock: the connection to it."""
    return _live(WorkerChannel(sock), None, own_log=False)


def _live(channel: WorkerChannel, outbox: Arena | None, own_log: bool) -> int:
    try:
        log.configure(os.environ)
    except ValueError as error:
        # The server has reported it already; a worker goes on with the defaults.
        print(f"Serving Error: {error}", file=sys.stderr, flush=True)
    worker = Worker(channel, outbox)

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted a holder of the locks that sending takes.
        threading.Thread(target=worker.leave, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    faulthandler.register(DUMP)  # written by C code at once, whoever holds the interpreter's lock
    received = channel.receive()
    if received is None or not isinstance(received[0], Load):
        return 1
    worker.listen()
    job = received[0].job
    try:
        if outbox is None:
            settle_in(job)
        worker.start(job)
    except BaseException as error:  # user code and back ends may raise anything; the server reports it
        text = _sendable(str(failed_load(f"servable '{job.name}' in '{job.directory}'", error)))
        if job.ranks is not None:
            text = f"{{distributed servable:{job.name}, Raise failed: {text}}}"
        sys.stdout.flush()  # once it knows of the failure, the server may end this process before `finish` flushes
        if own_log:
            print(f"Serving Error: {text}", file=sys.stderr, flush=True)
        return 1 if channel.send(Failed(text)) else ORPHANED
    worker.serve()
    return ORPHANED if worker.orphaned else 0
