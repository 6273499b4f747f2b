"""Makes room for models: unloads those that were not used for long, before a load and after an idle time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inflight.config import RoomConfig
from inflight.errors import InflightError, Unavailable
from inflight.repository import Loaded, leaving

log = logging.getLogger("inflight")

LOOKED = 0.1
"""Seconds between two looks whether a model can go."""
YOUNG = 0.5
"""Seconds after its load in which a model is not unloaded for another one: those who waited for it come first."""
MADE_ROOM = "unloaded to make room for others"
"""The reason in the index of a model that was unloaded for another one, or after an idle time."""
_MIB = 1 << 20


@dataclass(frozen=True)
class Present:
    """A model that is loaded, as the server's parts see it.

    Attributes:
        pids: its processes on this machine.
        files: bytes of its files.
        used: time of its last request by `time.perf_counter`; 0: there was none.
        changing: it is being loaded or unloaded.
    """

    name: str
    pids: Sequence[int]
    files: int
    used: float
    busy: bool
    changing: bool


class Room:
    """The room that models have. Lives on the server's event loop.

    Args:
        present: returns the models that are loaded.
        end: takes a model out of service; what it returns is done when its processes have ended.
    """

    def __init__(
        self,
        config: RoomConfig,
        present: Callable[[], Sequence[Present]],
        end: Callable[[str], Awaitable[asyncio.Future[object]]],
    ) -> None:
        self._config = config
        self._present = present
        self._end = end
        self._measured: dict[str, int] = {}
        self._since: dict[str, float] = {}  # when each was loaded
        self._taken: dict[str, int] = {}  # bytes of those that load
        self._leaving: dict[asyncio.Future[object], int] = {}  # bytes of those whose processes have not ended
        self._idling: asyncio.Task[None] | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a limit to what may be loaded."""
        return self._config.max_loaded is not None or self._config.max_loaded_memory is not None

    async def make(self, name: str, files: int) -> None:
        """Unloads what has to go before a model is loaded, and keeps its room until `loaded`.

        Args:
            files: bytes of its files, which count until it was measured.

        Raises:
            Unavailable: there is no room in time.
        """
        self._begin()
        size = max(files, self._measured.get(name, 0))
        limit = self._config.max_loaded_memory
        if limit is not None and size > limit:
            raise Unavailable(
                f"'{name}' takes {size // _MIB} MiB, and all models together may take {limit // _MIB}; raise "
                "--max-loaded-memory"
            )
        if not self.limited:
            return
        end = time.perf_counter() + self._config.load_wait
        while (goes := leaving(self._others(name), size, self._config.max_loaded, limit)) is None:
            if time.perf_counter() > end:
                names = ", ".join(other.name for other in self._others(name))
                raise Unavailable(f"there is no room for '{name}': {names} are loaded; try again later")
            await asyncio.sleep(LOOKED)
        self._taken[name] = size  # at once: nobody else may take what is free, or is becoming so
        try:
            await self._emptied(name, goes)
        except BaseException:
            self.gave_up(name)
            raise

    async def _emptied(self, name: str, goes: Sequence[str]) -> None:
        """Unloads models for another one. Returns when their processes have ended, and so many of others that leave
        that the memory is there."""
        sizes = {other.name: other.size for other in self._others(name)}
        ends: list[asyncio.Future[object]] = []
        # All leave at once, before any of them may begin to load again and wait for room itself.
        for victim in goes:
            ended = await self._end(victim)
            ends.append(ended)
            self.leaves(victim, sizes[victim], ended)
            log.info("model '%s' is unloaded to make room for '%s'", victim, name)
        for ended in ends:
            await asyncio.wait([ended])  # others may wait for it, too
            ended.result()
        limit = self._config.max_loaded_memory
        while limit is not None and self._leaving:
            held = sum(self._leaving.values()) + sum(other.size for other in self._others(name)) + self._taken[name]
            if held <= limit:
                break
            await asyncio.wait(list(self._leaving), return_when=asyncio.FIRST_COMPLETED)

    def leaves(self, name: str, size: int, ended: asyncio.Future[object]) -> None:
        """Counts a model that was taken out of service until its processes have ended.

        Args:
            size: bytes of its files, or more.
            ended: is done then.
        """
        self._leaving[ended] = max(size, self._measured.get(name, 0))
        ended.add_done_callback(lambda ended: self._leaving.pop(ended, None))

    def gave_up(self, name: str) -> None:
        """A model whose room was kept could not be loaded."""
        self._taken.pop(name, None)

    async def loaded(self, name: str) -> None:
        """A model was loaded: measures what it takes."""
        self._since[name] = time.perf_counter()
        if self._config.max_loaded_memory is not None:
            here = [each for each in self._present() if each.name == name]
            pids = [pid for each in here for pid in each.pids]
            self._measured[name] = await asyncio.to_thread(held, pids)
        self._taken.pop(name, None)

    def _others(self, name: str) -> list[Loaded]:
        now = time.perf_counter()
        here = {
            each.name: Loaded(
                each.name,
                max(each.files, self._measured.get(each.name, 0)),
                max(each.used, self._since.get(each.name, 0.0)),
                each.busy,
                each.changing or now - self._since.get(each.name, -YOUNG) < YOUNG,
            )
            for each in self._present()
        }
        for loading, size in self._taken.items():
            before = here.get(loading)
            here[loading] = replace(before or Loaded(loading, size, now), stays=True)
        here.pop(name, None)
        return list(here.values())

    # Idle models

    def _begin(self) -> None:
        if self._config.idle_timeout and self._idling is None:
            self._idling = asyncio.get_running_loop().create_task(self._idle())

    begin = _begin

    def stop(self) -> None:
        """Unloads nothing any more."""
        if self._idling is not None:
            self._idling.cancel()

    async def _idle(self) -> None:
        """Unloads models that had no request for `idle_timeout` seconds."""
        limit = self._config.idle_timeout
        while True:
            now = time.perf_counter()
            for each in self._present():
                since = self._since.setdefault(each.name, now)  # what the server began with: from now on
                if not each.busy and not each.changing and now - max(each.used, since) >= limit:
                    log.info("model '%s' had no request for %g seconds and is unloaded", each.name, limit)
                    try:
                        self.leaves(each.name, each.files, await self._end(each.name))
                    except InflightError as error:
                        log.warning("model '%s' cannot be unloaded: %s", each.name, error)
            await asyncio.sleep(min(1.0, limit / 4))


def held(pids: Sequence[int]) -> int:
    """Bytes of memory that processes hold, what they share with others in equal parts. What is unknown counts
    nothing."""
    return sum(_held(pid) for pid in pids)


def _held(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # it ended, or another system
        pass
    return 0
