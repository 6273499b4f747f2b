"""Cancels work when its client leaves.

A quickly answered request costs one timer; only the connection of a request that takes longer than `grace` is watched,
by a task that ends with the call.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any, TypeVar

from inflight.errors import Cancelled
from inflight.wire.http.asgi import Receive

T = TypeVar("T")

GRACE = 0.05
"""Seconds of work after which the client is watched."""


class Disconnected(Cancelled):
    """The client closed its connection before its answer."""


class _Interrupt:
    """Cancels the task that created it, once, and tells this cancellation from others."""

    __slots__ = ("_before", "_task", "fired")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._before = 0
        if sys.version_info >= (3, 11):
            self._before = task.cancelling()
        self.fired = False

    def fire(self) -> None:
        self.fired = True
        self._task.cancel()

    def settle(self) -> bool:
        """Takes the cancellation back. Returns True if it was the task's only one."""
        if not self.fired:
            return False
        if sys.version_info >= (3, 11):
            return self._task.uncancel() <= self._before
        return True


async def _watch(receive: Receive, interrupt: _Interrupt) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    interrupt.fire()


async def run_until_disconnect(awaitable: Awaitable[T], receive: Receive, grace: float = GRACE) -> T:
    """Awaits work for a client and cancels it if the client leaves first.

    Args:
        awaitable: the work; it is awaited in the calling task, so cancelling that task cancels the work too.
        receive: the request's ASGI `receive`, its body already read.
        grace: seconds before `receive` is called for the first time.

    Raises:
        Disconnected: the client left; the work has been cancelled and has ended.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    interrupt = _Interrupt(task)
    watchers: list[asyncio.Task[None]] = []
    timer = loop.call_later(grace, lambda: watchers.append(loop.create_task(_watch(receive, interrupt))))
    try:
        result = await awaitable
    except asyncio.CancelledError:
        if interrupt.settle():
            raise Disconnected("the client closed its connection before the answer was ready") from None
        raise
    else:
        interrupt.settle()
        return result
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()
            # Waits until the watching task has ended, and retrieves an error of its `receive`.
            await asyncio.gather(watcher, return_exceptions=True)
