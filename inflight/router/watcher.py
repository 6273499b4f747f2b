"""Follows the folders of models: loads what is new, loads again what has changed, unloads what is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from inflight.errors import InflightError
from inflight.repository import Found, Snapshot, snapshot

log = logging.getLogger("inflight")


class Watcher:
    """Looks at the folders again and again. Files are compared, not events: those of network file systems send none.

    Args:
        seconds: between two looks.
        scan: returns the models of the folders by name; it is called on a thread.
        load, unload: called with a model's name; what they raise is in the index already.
    """

    def __init__(
        self,
        seconds: float,
        scan: Callable[[], Mapping[str, Found]],
        load: Callable[[str], Awaitable[object]],
        unload: Callable[[str], Awaitable[object]],
    ) -> None:
        self._seconds = seconds
        self._scan = scan
        self._load, self._unload = load, unload
        self._seen: dict[str, Snapshot] = {}  # at the last look
        self._taken: dict[str, Snapshot] = {}  # what was loaded last, or could not be loaded

    async def run(self) -> None:
        """Follows the folders until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                now = await loop.run_in_executor(None, self._look)
            except OSError as error:
                log.warning("the folders of models cannot be read: %s", error)
            else:
                await self._follow(now)
            await asyncio.sleep(self._seconds)

    def _look(self) -> dict[str, Snapshot]:
        return {name: snapshot(found) for name, found in self._scan().items()}

    async def _follow(self, now: dict[str, Snapshot]) -> None:
        """Takes up what is the same as at the last look, as a file that is still written is not, and was not taken up
        before."""
        for name in [name for name in self._taken if name not in now and name not in self._seen]:
            del self._taken[name]
            await self._tried(self._unload, name)
        for name, state in now.items():
            if state == self._seen.get(name) and state != self._taken.get(name):
                self._taken[name] = state
                await self._tried(self._load, name)
        self._seen = now

    async def _tried(self, change: Callable[[str], Awaitable[object]], name: str) -> None:
        try:
            await change(name)
        except InflightError as error:
            log.warning("model '%s' stays as it is: %s", name, error)
