"""The requests that wait for a row: a queue for each priority."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator

from inflight.sched.sequence import Sequence

PURGE = 1024
"""Finished requests in the queues above which they are removed."""


class Queues:
    """Orders waiting requests by priority, then by arrival. `Sequence.queued` says which ones are here.

    Finished ones stay until they are at the head, or until there are many of them; they are never told.
    """

    def __init__(self) -> None:
        self._queues: dict[int, deque[Sequence]] = {}  # by priority
        self._priorities: list[int] = []  # descending, as negatives
        self._gone = 0  # number of finished ones

    def __len__(self) -> int:
        return sum(map(len, self._queues.values())) - self._gone

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, the queues in the order of their first request."""
        return (sequence for queue in self._queues.values() for sequence in queue if not sequence.finished)

    def add(self, sequence: Sequence) -> None:
        """Queues a request behind those of its priority."""
        sequence.queued = True
        self._queue(sequence.priority).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Puts a request that ran before to the head of its queue."""
        sequence.queued = True
        self._queue(sequence.priority).appendleft(sequence)

    def first(self) -> Sequence | None:
        """The request whose turn it is; None if none waits."""
        for negative in self._priorities:
            queue = self._queues[-negative]
            while queue and queue[0].finished:
                queue.popleft()
                self._gone -= 1
            if queue:
                return queue[0]
        return None

    def take(self, sequence: Sequence) -> None:
        """Takes out the one that is `first`."""
        self._queue(sequence.priority).popleft()
        sequence.queued = False

    def heads(self) -> list[Sequence]:
        """The first request of each queue."""
        found = (next((each for each in queue if not each.finished), None) for queue in self._queues.values())
        return [sequence for sequence in found if sequence is not None]

    def release(self) -> list[Sequence]:
        """Takes out all, in the order of their turns. Those whose last tokens are on the way stay."""
        released: list[Sequence] = []
        for negative in self._priorities:
            queue = self._queues[-negative]
            staying = [row for row in queue if row.pending and not row.finished]
            released += [row for row in queue if not row.pending and not row.finished]
            queue.clear()
            queue.extend(staying)
        self._gone = 0
        for row in released:
            row.queued = False
        return released

    def finished(self) -> None:
        """Notes that one of the requests here is finished."""
        self._gone += 1
        if self._gone > PURGE and self._gone > self.held // 2:
            for priority, queue in self._queues.items():
                self._queues[priority] = deque(sequence for sequence in queue if not sequence.finished)
            self._gone = 0

    @property
    def held(self) -> int:
        """Number of requests that take memory here, finished ones included."""
        return sum(map(len, self._queues.values()))

    def _queue(self, priority: int) -> deque[Sequence]:
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = deque()
            insort(self._priorities, -priority)
        return queue
