"""Requests and the instances they are split into."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from inflight.errors import Cancelled, InflightError
from inflight.link import Blob
from inflight.types import Outcome, Value

if TYPE_CHECKING:
    from inflight.router.replica import Replica

Result: TypeAlias = "list[Outcome] | InflightError"
Done: TypeAlias = "Callable[[Request, Result], None]"


class Request:
    """What one caller waits for: an outcome for every instance, in order.

    Attributes:
        method: index of the method in the worker's offer.
        deadline: loop time after which nobody waits, or None.
        closed: it has its answer, or the caller left; instances still on their way are ignored.
    """

    __slots__ = ("_done", "closed", "deadline", "instances", "method", "outcomes", "remaining", "started")

    def __init__(self, method: int, rows: Sequence[Sequence[Value]], deadline: float | None, done: Done) -> None:
        """`done` is called once, on the loop, with the outcomes or the error of the whole request."""
        self.method = method
        self._done = done
        self.instances = [Instance(self, index, row) for index, row in enumerate(rows)]
        self.outcomes: list[Outcome] = [()] * len(self.instances)
        self.remaining = len(self.instances)
        self.deadline = deadline
        self.started = time.perf_counter()
        self.closed = False

    def settle(self, index: int, outcome: Outcome) -> None:
        """Takes one instance's outcome; the last one completes the request."""
        if self.closed:
            return
        self.outcomes[index] = outcome
        self.remaining -= 1
        if self.remaining == 0:
            self._close()
            self._done(self, self.outcomes)

    def waited(self) -> float:
        """Seconds since it arrived."""
        return time.perf_counter() - self.started

    def fail(self, error: InflightError) -> None:
        """Ends the whole request with an error."""
        if not self.closed:
            self._drop()
            self._done(self, error)

    def abandon(self) -> None:
        """The caller left: queued instances are forgotten, workers are told to skip theirs."""
        self.fail(Cancelled("the caller left"))

    def _close(self) -> None:
        """Instances and their request refer to each other; large inputs must not wait for the garbage collector."""
        self.closed = True
        for instance in self.instances:
            instance.row = ()
        self.instances = []

    def _drop(self) -> None:
        keys: dict[Replica, list[int]] = {}
        for instance in self.instances:
            if instance.replica is not None:
                keys.setdefault(instance.replica, []).append(instance.key)
            else:
                instance.row = ()  # the instance itself may wait in a queue for long
        for replica, dropped in keys.items():
            replica.drop(dropped)
        self.closed = True
        # A worker may still read the inputs of what it has: those instances keep their rows until it answers.
        self.instances = []


class Batch:
    """Instances that went to a worker in one message; `left` of them are not answered yet."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Instance:
    """One row of a request on its way to a worker and back.

    Attributes:
        key: the number a worker knows it by; set when it is sent.
        kills: workers that died while they had it.
        replica: who has it now.
        batch: with whom it went there.
    """

    __slots__ = ("batch", "index", "key", "kills", "replica", "request", "row")

    def __init__(self, request: Request, index: int, row: Sequence[Value | Blob]) -> None:
        self.request = request
        self.index = index
        self.row = row
        self.key = 0
        self.kills = 0
        self.replica: Replica | None = None
        self.batch: Batch | None = None

    def settle(self, outcome: Outcome) -> None:
        self.replica = None
        self.request.settle(self.index, outcome)
