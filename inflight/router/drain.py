"""Waits until what is replaced or unloaded has answered everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUIET = 0.2
"""Seconds without work after which nothing more is expected: a door may have found a model and not called it yet."""
_LOOKED = 0.02
"""Seconds between two looks. Only what is being replaced is looked at, so no request pays for it."""


async def drained(busy: Callable[[], bool], seconds: float) -> bool:
    """Waits until there has been no work for `QUIET` seconds.

    Args:
        busy: whether there is work now.
        seconds: the longest wait.

    Returns:
        Whether that happened in time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    idle_since: float | None = None
    while loop.time() < end:
        if busy():
            idle_since = None
        elif idle_since is None:
            idle_since = loop.time()
        elif loop.time() - idle_since >= QUIET:
            return True
        await asyncio.sleep(_LOOKED)
    return not busy()
