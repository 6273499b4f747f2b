"""A start that takes long says what it waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

log = logging.getLogger("inflight")

INTERVAL = 10.0
"""Seconds between two lines."""

T = TypeVar("T")


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
