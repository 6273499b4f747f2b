"""The jobs that wait for one runner, and which of them run next."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from inflight.pipeline.job import Job
from inflight.servable import StageSpec


@dataclass
class Lane:
    """The jobs of one stage of one method, in order of arrival.

    Attributes:
        limit: instances that run at once.
        max_wait: seconds that the first job waits for others.
        waiting: instances of all jobs.
    """

    stage: StageSpec
    limit: int
    max_wait: float
    jobs: deque[Job] = field(default_factory=deque)
    waiting: int = 0

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self.waiting += len(job)

    def take(self) -> list[Job]:
        """The first instances, at most `limit`: the last job of them is cut where it holds more."""
        room = self.limit
        taken: list[Job] = []
        while self.jobs and room:
            job = self.jobs.popleft()
            if len(job) > room:
                self.jobs.appendleft(job.part(room, len(job)))
                job = job.part(0, room)
            taken.append(job)
            room -= len(job)
        self.waiting -= self.limit - room
        return taken


@dataclass(frozen=True)
class Batch:
    """What a runner runs at once: jobs at the same stage of the same method."""

    stage: StageSpec
    jobs: list[Job]


class StageQueue:
    """Where jobs wait for a runner; `take` is called by that runner's threads only. Most have one, a model that takes
    several batches at once has more."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._methods: dict[str, list[Lane]] = {}
        self._order: list[str] = []
        self._closed = False
        self._waiting = 0  # threads in `take`

    def add_lane(self, method: str, stage: StageSpec, limit: int, max_wait: float) -> None:
        """Announces a stage; every stage must be announced before its jobs are put."""
        lanes = self._methods.setdefault(method, [])
        lanes.append(Lane(stage, limit, max_wait))
        lanes.sort(key=lambda lane: -lane.stage.index)
        self._order = list(self._methods)

    def put(self, jobs: Sequence[Job]) -> None:
        now = time.monotonic()
        with self._condition:
            for job in jobs:
                job.entered = now
                self._lane(job.method.name, job.stage.index).add(job)
            if self._waiting:
                self._condition.notify()

    @property
    def waiting(self) -> bool:
        """Whether a job waits, due or not."""
        return any(lane.jobs for lanes in self._methods.values() for lane in lanes)

    def limit(self, method: str, index: int, limit: int) -> None:
        """From now on at most `limit` instances of this stage run at once."""
        with self._condition:
            self._lane(method, index).limit = limit

    def take(self) -> Batch | None:
        """The next batch; waits for one. None once the queue is closed."""
        with self._condition:
            while not self._closed:
                lane, due = self._choose(time.monotonic())
                if lane is not None:
                    return Batch(lane.stage, lane.take())
                self._waiting += 1
                self._condition.wait(due)
                self._waiting -= 1
            return None

    def poll(self) -> tuple[Batch | None, float | None]:
        """The next batch without waiting, or None and the seconds until one is due (None: when a job is put)."""
        with self._condition:
            lane, due = self._choose(time.monotonic())
            return (None, due) if lane is None else (Batch(lane.stage, lane.take()), None)

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _lane(self, method: str, index: int) -> Lane:
        for lane in self._methods[method]:
            if lane.stage.index == index:
                return lane
        raise KeyError((method, index))

    def _choose(self, now: float) -> tuple[Lane | None, float | None]:
        """The policy: methods take turns; within a method the latest stage goes first.

        A lane takes what is there, without waiting for more, unless its method asked to wait (`max_wait_ms`).
        Returns the lane, or None and the seconds until a waiting lane is due (None: until a job arrives).
        """
        due: float | None = None
        for position, method in enumerate(self._order):
            for lane in self._methods[method]:
                if not lane.jobs:
                    continue
                left = lane.jobs[0].entered + lane.max_wait - now
                if lane.waiting >= lane.limit or left <= 0:
                    self._order.append(self._order.pop(position))
                    return lane, None
                due = left if due is None else min(due, left)
        return None, due
