"""The runs of a worker at this moment, in shared memory that its server can read at any time.

Messages cannot replace it: a function that spins in C holds the interpreter's lock, so no thread of its worker can send
one. Every runner (the thread of the Python stages, the thread of a model) therefore writes down the begin and the end
of each run, which costs about a microsecond, and the server reads it from time to time.

A worker on another machine has no memory with its server, so there a thread of its own tells the runs several times a
second while there is work (`ToldBoard`). When it falls silent, a run holds the interpreter's lock.

The board is the first block of the worker's outbox: a page with the number of runners, then one part for each of them:
state, range of the keys that run, time of the begin, keys. One thread writes a part, the server reads it.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

RUNNERS = 128
"""Runners that have a part; further ones run unwatched."""

_PAGE = 4096
_PART = 32 * 1024  # bytes
_STATE, _FIRST, _LAST, _BEGAN, _KEYS = 0, 1, 2, 3, 8  # words of 8 bytes in a part
_IDLE, _RUNNING, _WAITING = 0, 1, 2

MOST_KEYS = _PART // 8 - _KEYS
"""Instances of one run that are written down; the rest of a larger batch is left out."""

BOARD_BYTES = _PAGE + RUNNERS * _PART


class Runner:
    """One runner's part of the board. `begin`, `at`, `again` and `end` are called by its own thread."""

    def __init__(self, part: memoryview) -> None:
        self._words = part.cast("q")
        self._times = part.cast("d")
        self._lock = threading.Lock()
        self._waits = 0
        self._paused = 0.0

    @property
    def keys(self) -> list[int]:
        """Those of the instances that the call of user code is for, while it runs."""
        words = self._words
        return words[_KEYS + words[_FIRST] : _KEYS + words[_LAST]].tolist() if words[_STATE] != _IDLE else []

    def begin(self, keys: Sequence[int]) -> None:
        """A run of these instances begins."""
        words = self._words
        count = min(len(keys), MOST_KEYS)
        words[_KEYS : _KEYS + count] = array("q", keys[:count])
        words[_FIRST] = 0
        words[_LAST] = count
        self._times[_BEGAN] = time.monotonic()
        words[_STATE] = _RUNNING

    def at(self, first: int, last: int) -> None:
        """The run goes on with the instances [first, last) of those it began with; their time starts now."""
        self._words[_FIRST] = first
        self._words[_LAST] = min(last, MOST_KEYS)
        self._times[_BEGAN] = time.monotonic()

    def again(self) -> None:
        """The run begins another call of the model with some of its instances."""
        self._times[_BEGAN] = time.monotonic()

    def end(self) -> None:
        self._words[_STATE] = _IDLE

    def wait(self) -> None:
        """The runner waits for a model (`Model.call`): until `resume` its time stands still. From any thread."""
        with self._lock:
            self._waits += 1
            if self._waits == 1:
                self._paused = time.monotonic()
                if self._words[_STATE] == _RUNNING:
                    self._words[_STATE] = _WAITING

    def resume(self) -> None:
        with self._lock:
            self._waits -= 1
            if not self._waits and self._words[_STATE] == _WAITING:
                self._times[_BEGAN] += time.monotonic() - self._paused
                self._words[_STATE] = _RUNNING


class Board:
    """The worker's side.

    Args:
        memory: `BOARD_BYTES` zeros; None: private memory, which no server reads.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        self._memory = memory if memory is not None else memoryview(bytearray(BOARD_BYTES))
        self._count = self._memory[:_PAGE].cast("q")

    def runner(self) -> Runner:
        """A part for one more runner."""
        number = self._count[0]
        if number == RUNNERS:
            return Runner(memoryview(bytearray(_PART)))
        self._count[0] = number + 1
        return Runner(self._memory[_PAGE + number * _PART : _PAGE + (number + 1) * _PART])


class Run(NamedTuple):
    """The run of one runner.

    Attributes:
        began: `time.monotonic()`, which is one clock for all processes of a machine.
        waiting: it waits for a model that it called; its time stands still.
        keys: of its instances; 0 and less stand for calls from inside the worker.
    """

    began: float
    waiting: bool
    keys: list[int]


class BoardReader:
    """The server's side.

    Args:
        memory: the first `BOARD_BYTES` of a worker's outbox.

    Attributes:
        silent_since: time of the last word, where the worker tells its runs and has stopped to; None: it has not.
    """

    silent_since: float | None = None

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory.cast("q")
        self._times = memory.cast("d")

    def runs(self) -> list[Run]:
        """The current runs. A run that begins or ends at this moment may be left out."""
        runs: list[Run] = []
        for number in range(min(self._words[0], RUNNERS)):
            start = (_PAGE + number * _PART) // 8
            state, began = self._words[start + _STATE], self._times[start + _BEGAN]
            if state == _IDLE:
                continue
            first, last = self._words[start + _FIRST], self._words[start + _LAST]
            keys = self._words[start + _KEYS + first : start + _KEYS + last].tolist()
            if (state, began) == (self._words[start + _STATE], self._times[start + _BEGAN]):
                runs.append(Run(began, state == _WAITING, keys))
        return runs

    def close(self) -> None:
        """Releases the memory, so that it can be unmapped."""
        self._words.release()
        self._times.release()
        self._memory.release()


TELL_SECONDS = 0.25
"""Seconds between two messages of a worker that tells its runs."""

FRESH_SECONDS = 1.0
"""Seconds for which what it told counts."""


class ToldBoard:
    """The server's side for a worker on another machine, which tells its runs in messages."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._heard = time.monotonic()
        self._looks = 0

    def tell(self, runs: Sequence[tuple[float, bool, list[int]]]) -> None:
        """Takes what the worker told: of each run the seconds since its begin, whether it waits, its keys."""
        self._heard = now = time.monotonic()
        self._looks = 0
        self._runs = [Run(now - seconds, waiting, keys) for seconds, waiting, keys in runs]

    def runs(self) -> list[Run]:
        """The runs that the worker told last; none where that is too long ago."""
        self._looks += 1
        return self._runs if time.monotonic() - self._heard < FRESH_SECONDS else []

    @property
    def silent_since(self) -> float | None:
        """As that of `BoardReader`. Only from the second look on, because messages may have come while this process
        did something else, and are read between two looks."""
        return self._heard if self._looks > 1 and time.monotonic() - self._heard > FRESH_SECONDS else None

    def close(self) -> None:
        """Nothing is to be released."""
