"""The threads that run a worker's Python stages, one of them at a time.

A stage that waits in `Model.call` does nothing, so the next stage may run meanwhile: then the calls of many instances
wait for the model together and share its batches. Each stage needs a stack of its own for that, which is a thread.

One thread has *the turn*: it runs user code or takes the next batch. It gives the turn away when it calls a model or
finds nothing to run, and only the threads named below get it, each by a lock of its own, so nobody is woken in vain:

- first who has got its answer, in the order of the answers, because its instance is nearer to its end;
- else an idle thread, if stages wait: the first one (the worker's main thread) before all others, so that a servable
  whose stages do not overlap has one thread;
- else a new thread, up to `most`;
- else nobody has it, until a job is put or a call is answered.
"""

from __future__ import annotations

import contextvars
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from inflight.link import Runner
from inflight.pipeline.queue import Batch, StageQueue

MOST = 64
"""Threads of a crew: two full batches of 32, one that the model runs and one that gathers."""


class Member:
    """One thread of a crew.

    Attributes:
        runner: its part of the board.
        batch: what it runs, while it runs.
        ended: the crew is closed, and its thread ends.
    """

    __slots__ = ("batch", "ended", "runner", "wake")

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.batch: Batch | None = None
        self.ended = False
        self.wake = threading.Lock()  # released by whoever gives it the turn, which is once for each wait
        self.wake.acquire()


Run: TypeAlias = "Callable[[Batch, Member], None]"


class Crew:
    """Runs what waits in a queue of Python stages.

    Args:
        queue: only the crew takes from it.
        run: runs a batch on the calling thread.
        runner: a part of the board for one more thread.
        most: threads at most.
    """

    def __init__(self, queue: StageQueue, run: Run, runner: Callable[[], Runner], most: int = MOST) -> None:
        self._queue = queue
        self._run = run
        self._runner = runner
        self._most = most
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()  # what user code has set, while it was imported, holds everywhere
        self._here = threading.local()
        self._first = Member(runner())
        self._idle = [self._first]
        self._answered: deque[Member] = deque()
        self._free = True
        self._closed = False
        self._count = 1
        self.current = self._first
        """Who has the turn, or had it last."""

    def work(self) -> None:
        """Runs stages on the calling thread, which is the crew's first, until the crew is closed."""
        self._work(self._first)

    def notice(self) -> None:
        """Something was put into the queue."""
        with self._lock:
            if self._free and not self._closed:
                self._give_to(self._somebody())

    def close(self) -> None:
        """Lets every thread end that is idle or becomes so."""
        with self._lock:
            self._closed = True
            for member in self._idle:
                member.ended = True
                member.wake.release()
            self._idle.clear()

    def here(self) -> Member | None:
        """The calling thread's member; None on a thread that user code has started."""
        found: Member | None = getattr(self._here, "member", None)
        return found

    def wait(self, member: Member) -> None:
        """Gives the turn away until `answered` was called for this member, which may have happened already, and it has
        the turn again. Called on the member's thread."""
        with self._lock:
            self._give_to(self._next() or (self._somebody() if self._queue.waiting else None))
        member.wake.acquire()

    def answered(self, member: Member) -> None:
        """The call that a member waits for, or is about to wait for, was answered. From any thread."""
        with self._lock:
            if self._free:
                self._give_to(member)
            else:
                self._answered.append(member)

    def _follow(self, me: Member) -> None:
        try:
            self._work(me)
        except BaseException:  # that of the first thread ends the process as well
            traceback.print_exc()
            os._exit(1)

    def _work(self, me: Member) -> None:
        self._here.member = me
        due: float | None = None
        while self._has_turn(me, due):
            me.batch, due = self._take(me)
            while me.batch is not None:
                self._run(me.batch, me)
                me.batch, due = self._take(me)

    def _take(self, me: Member) -> tuple[Batch | None, float | None]:
        """The next batch; or None, the turn is given away, and the seconds until a lane is due."""
        due: float | None = None
        with self._lock:
            other = self._next()
            if other is None and not self._closed:
                batch, due = self._queue.poll()
                if batch is not None:
                    return batch, None
            me.ended = self._closed
            if not me.ended:
                self._idle.append(me)
            self._give_to(other)
            return None, due

    def _has_turn(self, me: Member, due: float | None) -> bool:
        """Waits for the turn; takes it after `due` seconds if nobody has it then. False: the crew is closed."""
        if not me.ended and not me.wake.acquire(timeout=-1 if due is None else max(0.0, due)):
            with self._lock:
                if self._free and me in self._idle:
                    self._idle.remove(me)
                    self._give_to(me)
            me.wake.acquire()  # whoever has the turn looks at the queue before giving it away
        return not me.ended

    def _give_to(self, member: Member | None) -> None:
        self._free = member is None
        if member is not None:
            self.current = member
            member.wake.release()

    def _next(self) -> Member | None:
        return self._answered.popleft() if self._answered else None

    def _somebody(self) -> Member | None:
        """An idle thread, or a new one; None: all wait for models."""
        if self._first in self._idle:
            self._idle.remove(self._first)
            return self._first
        if self._idle:
            return self._idle.pop()
        if self._count == self._most:
            return None
        member = Member(self._runner())
        run = self._context.copy().run
        thread = threading.Thread(target=run, args=(self._follow, member), name=f"stages-{self._count}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            self._most = self._count
            return None
        self._count += 1
        return member
