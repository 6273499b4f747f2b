"""Starts: one that takes long says what it waits for, one that is killed again and again ends, files are read aside,
and what a start has made is left alone by the garbage collector."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from inflight.errors import StartError

log = logging.getLogger("inflight")

INTERVAL = 10.0
"""Seconds between two lines."""

KILLED_STARTS = 3
"""First starts that somebody may kill before it is given up. Later ones, of what has been ready, may be killed without
end."""

T = TypeVar("T")


def settle() -> None:
    """Takes what this process has by now out of the garbage collector's sight.

    It stays to the end, and to look at all of it takes 20 to 60 ms: once a second under load, and nobody is answered
    meanwhile. To be called at the end of a start, by programs: the objects of a library's user are not ours to settle.
    """
    gc.collect()
    gc.freeze()


def killed_too_often(error: StartError) -> StartError:
    """The error of the last of `KILLED_STARTS` starts, all of which were killed."""
    return StartError(
        f"{error.message}; so ended all of {KILLED_STARTS} starts: somebody kills them, or the system does because "
        "memory is short"
    )


async def waited_for(what: Callable[[], str], work: Awaitable[T]) -> T:
    """The result of `work`; until it is there, one warning every `INTERVAL` seconds.

    Args:
        what: who does what now: `worker device0 of servable 'digits' loads model 'net.onnx'`.
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
    """The result of a call on a thread of its own, which does not keep the process: a file may be on a disk that hangs,
    and Python waits at its end for the threads of an executor.

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
