"""Requests and the instances they are split into."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from inflight.contract import Outcome, Value
from inflight.errors import Cancelled, InflightError
from inflight.link import Blob

Result: TypeAlias = "list[Outcome] | InflightError"
Done: TypeAlias = "Callable[[Request, Result], None]"
SayTo: TypeAlias = "Callable[[int, str], None]"
"""Told the index of an instance and more of its text."""


class Holder(Protocol):
    """A replica, as the requests see it whose instances it has."""

    def drop(self, keys: list[int]) -> None:
        """Nobody waits for these instances any more."""


@dataclass
class Late:
    """What a worker that is hung was at.

    Attributes:
        keys: instances of the run that does not end; empty where the worker runs nothing and answers nothing.
        seconds: what the run was allowed.
        again: how many of these instances, when they ran alone afterwards, did not end either.
    """

    keys: tuple[int, ...]
    seconds: float
    again: int = 0


class Request:
    """What one caller waits for: an outcome for every instance, in order.

    Attributes:
        method: index of the method in the worker's offer.
        deadline: loop time after which nobody waits, or None.
        closed: it has its answer, or the caller left; instances still on their way are ignored.
    """

    __slots__ = (
        "_done",
        "_on_close",
        "closed",
        "deadline",
        "instances",
        "method",
        "outcomes",
        "remaining",
        "say",
        "seed",
        "started",
    )

    def __init__(
        self,
        method: int,
        rows: Sequence[Sequence[Value]],
        deadline: float | None,
        done: Done,
        say: SayTo | None = None,
    ) -> None:
        """`done` is called once, on the loop, with the outcomes or the error of the whole request; `say` with every
        piece of text that a language model writes for one of the instances."""
        self.say = say
        self.seed: int | None = None
        self._on_close: list[Callable[[], object]] = []
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

    def on_close(self, call: Callable[[], object]) -> None:
        """Something to end when nobody waits any more."""
        self._on_close.append(call)

    def _end_generations(self) -> None:
        calls, self._on_close = self._on_close, []
        for call in calls:
            call()

    def _close(self) -> None:
        """Instances and their request refer to each other; large inputs must not wait for the garbage collector."""
        self.closed = True
        for instance in self.instances:
            instance.row = ()
        self.instances = []

    def _drop(self) -> None:
        keys: dict[Holder, list[int]] = {}
        for instance in self.instances:
            if instance.replica is not None:
                keys.setdefault(instance.replica, []).append(instance.key)
            else:
                instance.row = ()  # the instance itself may wait in a queue for long
        for replica, dropped in keys.items():
            replica.drop(dropped)
        self.closed = True
        self._end_generations()
        # A worker may still read the inputs of what it has: those instances keep their rows until it answers.
        self.instances = []


class SentTogether:
    """Instances that went to a worker in one message; `left` of them are not answered yet."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Instance:
    """One row of a request on its way to a worker and back.

    Attributes:
        key: the number a worker knows it by; set when it is sent.
        kills: workers that died while they had it.
        late: what its worker was at when it had to be ended, if this instance was part of it.
        blame: how much speaks for it being the reason (`inflight.router.group.PROOF`).
        replica: who has it now.
        sent_with: the instances that went to the worker in the same message.
        generations: how many its method's stages began since it was sent; calls: those that run now.
        said: characters that the client already has of each generation.
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
        "row",
        "said",
        "sent_with",
    )

    def __init__(self, request: Request, index: int, row: Sequence[Value | Blob]) -> None:
        self.request = request
        self.index = index
        self.row = row
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
        """Its worker is gone: ends the generations that it waited for. Whether there were any."""
        calls, self.calls = self.calls, []
        for call in calls:
            call.cancel()
        self.generations = 0
        return bool(calls)

    def next_generation(self) -> tuple[Callable[[str], None] | None, int]:
        """Who is told its text, and its seed.

        An instance whose worker died generates anew, from the same seed and so the same text: the client is told only
        what it does not have yet.
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
        self.request.settle(self.index, outcome)
