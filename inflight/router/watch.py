"""Notices a worker that runs something for longer than it may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from inflight.link import BoardReader
from inflight.router.request import Instance, Late

STUCK = 60.0
"""Seconds beyond the longest limit in which a worker may have instances and run none of them: its stages may wait for
fuller batches (`max_wait_ms`)."""

LOOKS = 8
"""How often in the shortest limit somebody looks, at least; between 20 times a second and every 5 seconds."""


class ExecutionWatch:
    """Watches one worker while it has instances, with one timer and without a message: it reads the worker's board.

    Args:
        board: of the worker.
        limits: seconds that a run of an instance of each method may take, by the method's index; None: any time.
        instances: what the worker has, by key.
        on_late: called once; then nothing is watched any more.

    Attributes:
        calls: rows that the worker has sent to models elsewhere and that are not answered yet.
        answers: messages that came from it.
    """

    def __init__(
        self,
        board: BoardReader,
        limits: Mapping[int, float | None],
        instances: Mapping[int, Instance],
        on_late: Callable[[Late], None],
    ) -> None:
        self._board = board
        self._limits = limits
        self._instances = instances
        self._on_late = on_late
        self._timer: asyncio.TimerHandle | None = None
        self._silent_since = 0.0
        self._heard = 0
        self.calls = 0
        self.answers = 0
        given = [limit for limit in limits.values() if limit is not None]
        self._longest = max(given, default=0.0)
        self._every = min(5.0, max(0.05, min(given, default=0.0) / LOOKS))
        self.armed = not given  # nothing to watch: as if it were watched already

    def arm(self) -> None:
        """The worker has got work; `armed` says that this need not be called."""
        self.armed = True
        self._silent_since = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._every, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._board.close()
        self.armed = True

    def _look(self) -> None:
        if not self._instances:
            self.armed = False  # the next work arms it
            return
        late = self._late()
        if late is None:
            self._timer = asyncio.get_running_loop().call_later(self._every, self._look)
        else:
            self._on_late(late)

    def _late(self) -> Late | None:
        now = time.monotonic()
        runs = self._board.runs()
        if runs or self.calls or self.answers != self._heard:
            self._silent_since = now
            self._heard = self.answers
        waiting = [key for run in runs if run.waiting for key in run.keys]
        for run in runs:
            if run.waiting:
                continue
            keys = [key for key in run.keys if key in self._instances]
            # A model that the worker's own stages called knows no instances: theirs are those who wait.
            keys = keys or [key for key in waiting if key in self._instances]
            limit = self._limits[self._instances[keys[0]].request.method] if keys else self._longest
            if limit is not None and now - run.began > limit:
                return Late(tuple(keys), limit)
        if None not in self._limits.values() and now - self._silent_since > self._longest + STUCK:
            return Late((), now - self._silent_since)
        return None
