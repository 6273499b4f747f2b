"""Helps for starts: messages while one takes long, an end for one that is killed repeatedly, calls on threads of their
own, and no garbage collection of what lives as long as the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from inflight import early
from inflight.errors import StartError

log = logging.getLogger("inflight")

INTERVAL = 10.0
"""Seconds between two lines."""

KILLED_STARTS = 3
"""A process whose first starts were killed this many times is given up. One that has been ready before is started again
without limit."""

T = TypeVar("T")


def settle() -> None:
    """Excludes the objects that exist by now from garbage collection, which is no longer rare from then on.

    They live as long as the process. A full collection over them takes 20 to 60 ms, comes once a second under load and
    stops every request meanwhile. Only programs call this, at the end of their start: in a library, some of the objects
    are its user's.
    """
    gc.collect()
    gc.freeze()
    early.collect_as_usual()


def killed_too_often(error: StartError) -> StartError:
    """The error to raise after `KILLED_STARTS` starts in a row were killed. Args: error: of the last one."""
    return StartError(
        f"{error.message}; so ended all of {KILLED_STARTS} starts: somebody kills them, or the system does because "
        "memory is short"
    )


async def waited_for(what: Callable[[], str], work: Awaitable[T]) -> T:
    """Awaits `work` and returns its result; meanwhile logs a warning every `INTERVAL` seconds.

    Args:
        what: describes the present step: `worker device0 of servable 'digits' loads model 'net.onnx'`.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()

    timer: asyncio.TimerHandle

    def tell() -> None:
        nonlocal timer
        log.warning("still waiting after %d seconds: %s", loop.time() - start, what())
        timer = loop.call_later(INTERVAL, tell)

    timer = loop.call_later(INTERVAL, tell)
    try:
        return await work
    finally:
        timer.cancel()


async def aside(call: Callable[[], T], name: str) -> T:
    """Awaits the result of a call on a thread of its own, a daemon.

    The call may read from a disk that hangs, and Python waits at its end for the threads of an executor, not for these.

    Args:
        name: of the thread.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()  # who waits may leave; the thread still ends in order

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await asyncio.wrap_future(result)
