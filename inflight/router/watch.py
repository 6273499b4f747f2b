"""Detects workers whose runs take longer than their limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from inflight.link import BoardReader, ToldBoard
from inflight.router.request import Instance, Late

STUCK = 60.0
"""Seconds beyond the longest limit in which a worker may have instances without running any: its stages may wait for
fuller batches (`max_wait_ms`)."""

SILENT = 1.0
"""Seconds beyond the longest limit in which a worker on another machine may tell nothing while it has instances."""

LOOKS = 8
"""Checks per shortest limit, at least. A check comes at most every 50 ms and at least every 5 s."""


class ExecutionWatch:
    """Watches one worker while it has instances. A timer reads the worker's board.

    Args:
        board: the worker's board, in shared memory or as it tells it.
        limits: seconds that one run may take, by method index; None: no limit.
        instances: the worker's instances by key.
        on_late: called once, with the run that took too long; nothing is watched after that.

    Attributes:
        calls: number of rows that the worker has sent to models elsewhere and that are not answered yet.
        answers: number of messages with outcomes that the worker has sent.
    """

    def __init__(
        self,
        board: BoardReader | ToldBoard,
        limits: Mapping[int, float | None],
        instances: Mapping[int, Instance],
        on_late: Callable[[Late], None],
    ) -> None:
        self._board = board
        self._limits = limits
        self._instances = instances
        self._on_late = on_late
        self._timer: asyncio.TimerHandle | None = None
        self._silent_since = self._armed = 0.0
        self._heard = 0
        self.calls = 0
        self.answers = 0
        finite = [limit for limit in limits.values() if limit is not None]
        self._longest = max(finite, default=0.0)
        self._every = min(5.0, max(0.05, min(finite, default=0.0) / LOOKS))
        self.armed = not finite  # without limits there is nothing to watch, so `arm` is never called

    def arm(self) -> None:
        """Starts the timer, because the worker has got work. Need not be called while `armed`."""
        self.armed = True
        self._silent_since = self._armed = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(self._every, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._board.close()
        self.armed = True

    def _look(self) -> None:
        if not self._instances:
            self.armed = False  # started again with the next work
            return
        late = self._late()
        if late is None:
            self._timer = asyncio.get_running_loop().call_later(self._every, self._look)
        else:
            self._on_late(late)

    def _known(self, keys: Sequence[int]) -> list[int]:
        """The worker's instances among these keys; a stage's calls of a model have its instance's, each of them."""
        return [key for key in dict.fromkeys(keys) if key in self._instances]

    def _limit(self, keys: Sequence[int]) -> float | None:
        """That of the method with the least time, because instances of several methods may share the run of a model."""
        limits = {self._limits[self._instances[key].request.method] for key in keys}
        return min((each for each in limits if each is not None), default=None) if keys else self._longest

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
            keys = self._known(run.keys) or self._known(waiting)
            limit = self._limit(keys)
            if limit is not None and now - run.began > limit:
                return Late(tuple(keys), limit)
        if None in self._limits.values():
            return None
        silent = self._board.silent_since
        if silent is not None and now - max(silent, self._armed) > self._longest + SILENT:
            # Some run holds the interpreter's lock. Nobody knows which, so all that the worker has may be to blame.
            return Late(tuple(self._instances), self._longest)
        if now - self._silent_since > self._longest + STUCK:
            return Late((), now - self._silent_since)
        return None
