"""Requests and the instances they are split into."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from inflight.admission import Holder as KeyHolder
from inflight.contract import Outcome, Result, Row, SayTo, chain
from inflight.errors import Cancelled, InflightError

Done: TypeAlias = "Callable[[Request, Result], None]"


class Holder(Protocol):
    """What a request needs of the replica that has its instances."""

    def drop(self, keys: list[int]) -> None:
        """Tells the worker to skip these instances: their caller has left."""


@dataclass
class Late:
    """The run for which a hung worker was ended.

    Attributes:
        keys: instances of the run; empty if the worker had work but neither ran nor answered anything.
        seconds: the time limit that it exceeded.
        again: how many of these instances exceeded the limit again when they ran alone.
    """

    keys: tuple[int, ...]
    seconds: float
    again: int = 0


class Request:
    """One request: its instances, and their outcomes as they arrive.

    Attributes:
        method: index of the method in the worker's offer.
        rows: the inputs of its instances. When they are sent first, large values move to memory that workers can read.
        deadline: loop time at which the request fails, or None.
        caller: who has shown an API key with it.
        level: its priority: 1 is the highest; 0: it names none.
        started: when it arrived, by `time.perf_counter`.
        closed: the request was answered, or its caller left; outcomes that still arrive are ignored.
    """

    __slots__ = (
        "_done",
        "_on_close",
        "caller",
        "closed",
        "deadline",
        "instances",
        "level",
        "method",
        "outcomes",
        "remaining",
        "rows",
        "say",
        "seed",
        "started",
    )

    def __init__(
        self,
        method: int,
        rows: Sequence[Row],
        deadline: float | None,
        done: Done,
        say: SayTo | None = None,
    ) -> None:
        """`done` is called once, on the loop, with the outcomes or the error of the whole request; `say` is called with
        every piece of text that a language model writes for an instance."""
        self.say = say
        self.caller: KeyHolder | None = None
        self.seed: int | None = None
        self.level = 0
        self._on_close: list[Callable[[], object]] = []
        self.method = method
        self._done = done
        self.rows = rows
        self.instances = [Instance(self, index) for index in range(len(rows))]
        self.outcomes: dict[int, Sequence[Outcome]] = {}  # by the index of the first one
        self.remaining = len(self.instances)
        self.deadline = deadline
        self.started = time.perf_counter()
        self.closed = False

    def settle(self, index: int, outcomes: Sequence[Outcome]) -> None:
        """Adds the outcomes of the instances from `index` on. The last ones complete the request."""
        if self.closed:
            return
        self.remaining -= len(outcomes)
        if self.remaining or self.outcomes:
            self.outcomes[index] = outcomes
            if self.remaining:
                return
            outcomes = chain([self.outcomes[first] for first in sorted(self.outcomes)])
        self._close()
        self._done(self, outcomes)

    def fail(self, error: InflightError) -> None:
        """Ends the whole request with an error."""
        if not self.closed:
            self._drop()
            self._done(self, error)

    def abandon(self) -> None:
        """Ends the request because its caller left: drops queued instances and tells workers to skip theirs."""
        self.fail(Cancelled("the caller left"))

    def on_close(self, call: Callable[[], object]) -> None:
        """Registers a function that is called when the request ends before its outcomes are there."""
        self._on_close.append(call)

    def _end_generations(self) -> None:
        calls, self._on_close = self._on_close, []
        for call in calls:
            call()

    def _close(self) -> None:
        """Breaks the reference cycle with the instances, so that large inputs are freed at once."""
        self.closed = True
        self.rows = ()
        self.instances = []

    def _drop(self) -> None:
        keys: dict[Holder, list[int]] = {}
        for instance in self.instances:
            if instance.replica is not None:
                keys.setdefault(instance.replica, []).append(instance.key)
            else:
                instance.request = _GONE  # the instance itself may wait in a queue for long
        for replica, dropped in keys.items():
            replica.drop(dropped)
        self.closed = True
        self._end_generations()
        # A worker may still read the inputs of what it has: those instances keep their request until it answers.
        self.instances = []


class SentTogether:
    """Instances that were sent in one message; `left` counts those that are not answered yet."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Instance:
    """One row of a request on its way to a worker and back.

    Attributes:
        key: its number in messages to the worker; set when it is sent.
        kills: number of workers that died while they had it.
        late: the run for which its worker was ended, if this instance was part of that run.
        blame: sum of what worker deaths count against it (`inflight.router.group.PROOF`).
        replica: the replica that has it now.
        sent_with: the instances that were sent to the worker in the same message.
        generations: number of language-model stages begun since it was sent.
        calls: tasks of the language-model stages that run now.
        said: number of characters already sent to the client, for each language-model stage.
    """

    __slots__ = (
        "blame",
        "calls",
        "generations",
        "index",
        "key",
        "kills",
        "late",
        "replica",
        "request",
        "said",
        "sent_with",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.key = 0
        self.kills = 0
        self.blame = 0
        self.late: Late | None = None
        self.replica: Holder | None = None
        self.sent_with: SentTogether | None = None
        self.generations = 0
        self.calls: list[asyncio.Task[None]] = []
        self.said: list[int] = []

    def end_calls(self) -> bool:
        """Cancels its language-model stages, because its worker is lost. Returns whether there were any."""
        calls, self.calls = self.calls, []
        for call in calls:
            call.cancel()
        self.generations = 0
        return bool(calls)

    def next_generation(self) -> tuple[Callable[[str], None] | None, int]:
        """The text callback and the seed of the next language-model stage.

        After the loss of a worker the instance runs again from the same seeds, which gives the same texts. The callback
        leaves out what the client already has.
        """
        number = self.generations
        self.generations += 1
        request = self.request
        if request.seed is None:
            request.seed = random.getrandbits(64)
        seed = hash((request.seed, self.index, number)) & ((1 << 64) - 1)
        if request.say is None:
            return None, seed
        if number == len(self.said):
            self.said.append(0)
        written = 0

        def say(text: str) -> None:
            nonlocal written
            fresh = text[max(0, self.said[number] - written) :]
            written += len(text)
            if fresh and request.say is not None and not request.closed:
                self.said[number] += len(fresh)
                request.say(self.index, fresh)

        return say, seed

    def settle(self, outcome: Outcome) -> None:
        self.replica = None
        self.request.settle(self.index, [outcome])


Span: TypeAlias = tuple[Request, int, int]
"""Neighbours in a request: the instances from the first number up to the last, which is not among them. (A plain tuple,
because two are made for each request.)"""


def spans(instances: Sequence[Instance]) -> list[Span]:
    """The instances, in order, with neighbours taken together."""
    result: list[Span] = []
    request, first, last = None, 0, 0
    for instance in instances:
        if instance.request is request and instance.index == last:
            last += 1
            continue
        if request is not None:
            result.append((request, first, last))
        request, first = instance.request, instance.index
        last = first + 1
    if request is not None:
        result.append((request, first, last))
    return result


def _nobody_waits(request: Request, result: Result) -> None:
    pass


_GONE = Request(0, (), None, _nobody_waits)
"""The request of instances that are in a queue and whose own was dropped."""
_GONE.closed = True

NOBODYS = Instance(_GONE, 0)
"""Stands for an instance that is not known any more."""
