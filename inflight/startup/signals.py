"""Signals that are acted upon whatever the main thread is doing.

Python runs a signal's handler in the main thread, between two of its instructions. A signal that another thread takes,
or one that comes after the last instruction before a wait and before the kernel has put the thread to sleep, ends no
wait: its handler runs when the wait is over, which may be never. Two things help. Python's C code also writes the
number of each signal into a file descriptor, at once and in any thread (`signal.set_wakeup_fd`), which an event loop
reads here; and no wait of the main thread is longer than `LOOK`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import ClassVar

LOOK = 0.5
"""Seconds that the main thread waits at most before Python looks whether a signal's handler must run."""


def wait_until(event: threading.Event) -> None:
    """Waits for an event, and runs the handlers of signals meanwhile. They must not set it: an event's lock is not
    reentrant."""
    while not event.wait(LOOK):
        pass


@functools.cache
def _pipe() -> tuple[int, int]:
    """Descriptors: where the C code writes, where an event loop reads. Never closed: whoever replaces the descriptor
    may set it again at any time, and a number of a closed one might by then be another file's."""
    read, written = os.pipe()
    for end in (written, read):
        os.set_blocking(end, False)
    return written, read


class Wakeups:
    """The numbers of this process's signals, told on an event loop. One object of a process has them at a time; others,
    and all while somebody else has set a descriptor, do without."""

    _holder: ClassVar[Wakeups | None] = None

    def take(self) -> None:
        """Takes the numbers, if nobody has them. To be called in the main thread."""
        written, read = _pipe()
        before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        if Wakeups._holder is not None or before not in (-1, written):
            signal.set_wakeup_fd(before)
            return
        _numbers(read)  # of signals that came after the last holder
        Wakeups._holder = self

    def follow(self, loop: asyncio.AbstractEventLoop, told: Callable[[int], None]) -> None:
        """Calls `told` on the loop with each signal's number, those since `take` included."""
        if Wakeups._holder is self:
            read = _pipe()[1]

            def readable() -> None:
                for number in _numbers(read):
                    told(number)

            loop.add_reader(read, readable)

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends what `follow` began. To be called on the loop's thread, before it is closed."""
        if Wakeups._holder is self:
            loop.remove_reader(_pipe()[1])
            Wakeups._holder = None

    @staticmethod
    def give_back() -> None:
        """Takes the descriptor away, if it is still this module's and nobody follows it. To be called in the main
        thread."""
        if Wakeups._holder is None:
            now = signal.set_wakeup_fd(-1)
            if now != _pipe()[0]:
                signal.set_wakeup_fd(now)


def _numbers(read: int) -> bytes:
    try:
        return os.read(read, 4096)
    except BlockingIOError:
        return b""
