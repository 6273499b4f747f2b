"""Failures of user code and models: their tracebacks in the log, at a bounded rate."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from inflight import log
from inflight.errors import describe

INTERVAL = 10.0
"""Seconds in which failures of one kind are written to the log once."""

KINDS = 64
"""Kinds of failures that are remembered, so that a worker does not grow with the exception types of user code."""

FRAMES = 32
"""The innermost frames of an exception that are shown."""

_OURS = f"{Path(__file__).resolve().parent.parent}/"


class FailureLog:
    """Writes failures to the log: of each kind one in `INTERVAL` seconds, with the number of those left out.

    A kind is a stage and a type of exception; texts and values, which callers can vary, do not make a new kind. May be
    called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, type[BaseException]], tuple[float, int]] = {}

    def add(self, stage: str, error: BaseException, text: str) -> None:
        """Takes one failure.

        Args:
            stage: which stage of which method.
            text: the error text that its caller gets.
        """
        left_out = self._left_out((stage, type(error)))
        if left_out is not None:
            more = f"\n({left_out} more of this kind before it were not written)" if left_out else ""
            log.error("%s\n%s%s", text, user_traceback(error), more)

    def _left_out(self, kind: tuple[str, type[BaseException]]) -> int | None:
        """How many of the kind were left out since the last one that was written; None: this one is left out too."""
        now = time.monotonic()
        with self._lock:
            written, left_out = self._kinds.pop(kind, (now - INTERVAL, 0))
            due = now - written >= INTERVAL
            self._kinds[kind] = (now, 0) if due else (written, left_out + 1)
            if len(self._kinds) > KINDS:
                del self._kinds[next(iter(self._kinds))]
        return left_out if due else None


def user_traceback(error: BaseException) -> str:
    """The traceback, of the exception and those behind it, without the frames of this package."""
    try:
        captured = traceback.TracebackException.from_exception(error, compact=True)
        for link in _chain(captured):
            frames = [frame for frame in link.stack if not frame.filename.startswith(_OURS)]
            link.stack = traceback.StackSummary.from_list(frames[-FRAMES:])
        return "".join(captured.format()).rstrip()
    except BaseException:  # an exception of user code is user code: its attributes may raise anything
        return describe(error)


def _chain(captured: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """The exception and those it was raised from."""
    waiting = [captured]
    while waiting:
        link = waiting.pop()
        yield link
        waiting += [cause for cause in (link.__cause__, link.__context__) if cause is not None]
        waiting += getattr(link, "exceptions", None) or ()  # those of a group, from Python 3.11 on
