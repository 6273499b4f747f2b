"""A model that runs on a group of ranks: what the worker of a distributed servable holds in place of a loaded file.

A batch goes to every rank, in the same order to all; the last rank's outputs are its result. The ranks are processes of
others, on this machine or elsewhere (`agent`), and each has one connection. When a rank is lost the group is: ranks
that exchange tensors cannot go on without it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inflight.config import RanksConfig
from inflight.contract import Array
from inflight.distributed.connection import guard_of
from inflight.distributed.gathering import Gathering, Rank
from inflight.distributed.messages import (
    PROTOCOL,
    AnyMessage,
    Exit,
    GroupConfig,
    Ping,
    Pong,
    Predict,
    Predicted,
    ProtocolError,
    RankEnded,
    arrays_of,
    describe,
)
from inflight.distributed.signature import group_signature
from inflight.distributed.table import check_ranks, read_rank_table
from inflight.errors import PredictFailed, StartError
from inflight.runtime import LoadedModel
from inflight.version import __version__

log = logging.getLogger("inflight")

RANK_SECONDS = 10.0
"""How long a rank may take for a batch, counted from the answer of the rank before it: MindSpore Serving's limit."""

PING_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""A rank that has said nothing for so long is lost."""

FAREWELL_SECONDS = 0.5
"""How long to wait for a launcher's word on how an agent ended, after its connection has closed."""

HELD_SECONDS = 15.0
"""How long a batch that came after the loss is held back at most, for this process to end before it answers."""


@dataclass(frozen=True)
class Loss:
    """Why a group is lost.

    Attributes:
        outside: its agent was asked to end, or killed by somebody: no batch is to blame.
    """

    text: str
    outside: bool = False


@dataclass(frozen=True)
class GroupModel:
    """What a servable declares of its distributed model; `rank_size` ranks in `stage_size` stages."""

    servable: str
    rank_size: int
    stage_size: int
    pipeline: bool


@dataclass
class _Batch:
    """One batch on its way: what the ranks have answered."""

    answers: dict[int, Predicted] = field(default_factory=dict)
    outputs: list[Array] = field(default_factory=list)


class RankGroup(LoadedModel):
    """The ranks of one model. `run` may be called from as many threads as the model has `own_threads`.

    Args:
        ranks: where agents come, and how long to wait for them.
        ending: whether this process is to end.
        phase: called with the step that begins.
        lost: called once, on a thread of its own, when a rank is lost after all were there.

    Raises:
        StartError: the agents did not come, do not fit together, or one of them failed.
    """

    def __init__(
        self,
        model: GroupModel,
        ranks: RanksConfig,
        ending: Callable[[], bool],
        phase: Callable[[str], None],
        lost: Callable[[Loss], None],
    ) -> None:
        self._model = model
        self._on_lost = lost
        self._replayed = ranks.replay
        self._changed = threading.Condition()
        self._order = threading.Lock()  # batches reach all ranks in one order
        self._batches: dict[int, _Batch] = {}
        self._number = 0
        self._loss: Loss | None = None
        self._ended: dict[int, int] = {}  # status by rank, as launchers tell
        self._closed = False
        self._complete = False
        self._members: list[Rank] = []
        self._joined: list[Rank] = []
        self._gone: list[Rank] = []
        self._gathering = Gathering(ranks.address, self, guard_of(ranks.token, ranks.tls))
        print(f"Serving: Distributed gRPC server start success, listening on {ranks.address}", flush=True)
        atexit.register(self.close)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            self._gather(ranks, ending, phase)
        except BaseException:
            self.close()
            raise
        self.device_type = self._members[-1].device_type
        self.own_threads = model.stage_size if model.pipeline else 1

    def _gather(self, ranks: RanksConfig, ending: Callable[[], bool], phase: Callable[[str], None]) -> None:
        model = self._model
        table = read_rank_table(ranks.rank_table)
        check_ranks(table, model.rank_size, model.stage_size)
        self._gathering.open(GroupConfig(model.servable, table.text, list(table.ranks), PROTOCOL, __version__))
        wait = ranks.wait_seconds or None
        members = self._gathering.wait(wait, ending, phase)
        self.graphs = group_signature([rank.graphs for rank in members], model.stage_size)
        # Later stages get the inputs where they declare some.
        first = model.rank_size // model.stage_size
        self._fed = [rank.number < first or bool(rank.graphs[0].inputs) for rank in members]
        with self._changed:
            self._members = members
            self._complete = True
            gone = any(rank in self._gone for rank in members)
        if gone:
            raise StartError("Worker or Agents has stopped")
        log.info("all %d agents of distributed servable '%s' are registered", len(members), model.servable)

    # A batch

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        batch, described = _Batch(), describe(inputs)
        with self._order:
            self._check_alive()
            self._number += 1
            number = self._number
            self._batches[number] = batch
            for rank, fed in zip(self._members, self._fed, strict=True):
                result = rank.number == len(self._members) - 1
                message = Predict(number, subgraph, result, described if fed else [])
                # An agent that is gone is noticed where its connection is read.
                rank.connection.send(message, inputs if fed else ())
        try:
            return self._collect(batch)
        finally:
            with self._changed:
                del self._batches[number]

    def _collect(self, batch: _Batch) -> list[Array]:
        """Waits for the ranks in their order.

        Raises:
            PredictFailed: a rank failed; all have ended the batch, or the group is lost.
        """
        failed = ""
        for rank in range(len(self._members)):
            with self._changed:
                self._changed.wait_for(lambda: rank in batch.answers or self._loss is not None, RANK_SECONDS)  # noqa: B023
                answer = batch.answers.get(rank)
                loss = self._loss
            if answer is None and loss is None:
                log.error("Predict error happened, now exit distributed servable")
                loss = self._lose(Loss(failed or f"Failed to wait for result of rank {rank}"))
            if answer is None:
                assert loss is not None
                self._hold_back()
                raise PredictFailed(failed or loss.text)
            if answer.error and not failed:
                failed = f"Error happened on get result of rank {rank}: {answer.error}"
        if failed:
            raise PredictFailed(failed)
        return batch.outputs

    def _check_alive(self) -> None:
        if self._loss is not None or self._closed:
            # Not answered: where this process has ended, the server answers, or sends the batch to the next one.
            time.sleep(HELD_SECONDS)
            raise PredictFailed("Worker has stopped")

    def _hold_back(self) -> None:
        """Does not let a batch be answered that is going to be run again by the next process."""
        if self._replayed:
            time.sleep(HELD_SECONDS)

    # The ranks

    def joined(self, rank: Rank) -> None:
        """Reads a rank's connection, on the thread that let it in."""
        log.info("Register success: agent address: %s, rank %d", rank.address, rank.number)
        with self._changed:
            self._joined.append(rank)
        asked = False
        try:
            while (received := rank.connection.receive()) is not None:
                message, blob = received
                asked = isinstance(message, Exit)
                if asked:
                    break
                self._received(rank, message, blob)
        except ProtocolError as error:
            log.error("agent %s: %s", rank.address, error)
        with self._changed:
            self._joined.remove(rank)
            self._gone.append(rank)
            complete = self._complete
        rank.connection.close()
        if self._closed:
            return
        if not complete:
            log.warning("agent %s of rank %d has left", rank.address, rank.number)
            self._gathering.forget(rank)
            return
        self._lose(self._loss_of(rank, asked))

    def rank_ended(self, ended: RankEnded) -> None:
        with self._changed:
            # Agents of another group, which was here before or comes after, are none of this one's.
            if any((ended.rank, ended.pid) == (rank.number, rank.pid) for rank in (*self._joined, *self._gone)):
                self._ended[ended.rank] = ended.status
                self._changed.notify_all()

    def admit(self, agents: bool) -> None:
        """As `Gathering.admit`."""
        self._gathering.admit(agents)

    def _loss_of(self, rank: Rank, asked: bool) -> Loss:
        text = f"Error happened on get result of rank {rank.number}: agent {rank.address} is gone"
        if asked:
            return Loss(text, outside=True)
        with self._changed:
            self._changed.wait_for(lambda: rank.number in self._ended or self._loss is not None, FAREWELL_SECONDS)
            status = self._ended.get(rank.number)
        if status is None:
            return Loss(text)
        # -9, -15, -2 and -1: somebody ended it.
        return Loss(f"{text}, it ended with status {status}", outside=-status in (9, 15, 2, 1))

    def _received(self, rank: Rank, message: AnyMessage, blob: bytearray) -> None:
        if isinstance(message, Predicted):
            outputs = arrays_of(message.outputs, blob)
            with self._changed:
                batch = self._batches.get(message.number)
                if batch is not None:
                    batch.answers[rank.number] = message
                    if rank.number == len(self._members) - 1:
                        batch.outputs = outputs
                    self._changed.notify_all()
        elif not isinstance(message, Pong):
            raise ProtocolError(f"an unexpected message, {type(message).__name__}")

    def _beat(self) -> None:
        """Pings every rank, those too that wait for the others; one that says nothing is lost."""
        while not self._closed and self._loss is None:
            with self._changed:
                there, complete = self._members or list(self._joined), self._complete
            for rank in there:
                rank.connection.send(Ping())
                if time.monotonic() - rank.connection.heard > SILENT_SECONDS:
                    log.error("Recv Pong Time Out from %s, host address is %s", rank.address, self._gathering.address)
                    if complete:
                        self._lose(Loss(f"Error happened on get result of rank {rank.number}: it does not answer"))
                        return
                    rank.connection.close()  # another agent may take its place
            time.sleep(PING_SECONDS)

    def _lose(self, loss: Loss) -> Loss:
        """Notes that the group is lost; the first loss is the reason."""
        with self._changed:
            if self._loss is not None or self._closed:
                return self._loss or loss
            self._loss = loss
            self._changed.notify_all()
        log.error("distributed servable '%s' has lost a rank: %s", self._model.servable, loss.text)
        self._dismiss()
        threading.Thread(target=self._on_lost, args=(loss,), name="lost", daemon=True).start()
        return loss

    def _dismiss(self) -> None:
        with self._changed:
            there = self._members or sorted(self._joined, key=lambda rank: rank.number)
        for rank in there:
            rank.connection.send(Exit())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._dismiss()
        self._gathering.close()
        with self._changed:
            self._changed.notify_all()
