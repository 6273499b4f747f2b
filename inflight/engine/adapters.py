"""The LoRA adapters of one language model: their names, and how they come and go while it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from inflight.checkpoint import adapter_digest
from inflight.config import AdapterConfig
from inflight.contract import ShardOffer
from inflight.engine.executor import Executor
from inflight.engine.streams import Streams
from inflight.errors import InflightError, InvalidRequest, NotFound, StartError, Unavailable, WorkerLost
from inflight.sched import BY_CONTENT
from inflight.startup import aside, failed_load

log = logging.getLogger("inflight")


def number_of(folder: Path) -> int:
    """The number of an adapter that is loaded while the model serves, made of what its files hold: other factors have
    another number, so that no cached key of an earlier adapter is taken for one of its own.

    Raises:
        StartError, OSError: the folder holds no adapter, or it cannot be read.
    """
    return BY_CONTENT | adapter_digest(folder)


async def _read(name: str, folder: Path) -> int:
    """`number_of`, on a thread of its own. Raises StartError: it cannot be read."""
    try:
        return await aside(partial(number_of, folder), "adapter")
    except (InflightError, OSError) as error:
        raise failed_load(f"the adapter '{name}'", error, folder) from error


class Adapters:
    """The adapters by name. A request keeps the one that it began with.

    Args:
        first: those that the model starts with.
        reserved: names that stand for the model itself.
        streams: of the model.

    Attributes:
        names: in the order in which they were loaded.
    """

    def __init__(self, first: Sequence[AdapterConfig], reserved: Sequence[str], streams: Streams) -> None:
        self._known = {each.name: replace(each, number=place) for place, each in enumerate(first, 1)}
        self._reserved = reserved
        self._streams = streams
        self._leaving: list[int] = []  # numbers without a name, which requests may still have
        self._changes = asyncio.Lock()
        self._contents: dict[int, dict[int, int]] = {}  # of adapters, as the ranks of each replica have told them
        self.names: tuple[str, ...] = tuple(self._known)

    def number(self, name: str | None) -> int:
        """The number of an adapter in plans; 0 stands for the model alone.

        Raises:
            InvalidRequest: there is none of this name.
        """
        if name is None:
            return 0
        adapter = self._known.get(name)
        if adapter is None:
            raise InvalidRequest(f"the adapter '{name}' is not served; served here: {', '.join(self.names) or 'none'}")
        return adapter.number

    def content(self, number: int) -> int:
        """A number made of what the adapter's files hold, by which its prompts are kept in files; 0: it is not known,
        or not the same on all replicas."""
        told = {contents[number] for contents in self._contents.values() if number in contents}
        if number >= BY_CONTENT:
            told.add(number)
        return told.pop() if len(told) == 1 else 0

    async def load(self, name: str, folder: Path, executors: Sequence[Executor], *, again: bool = False) -> None:
        """Loads an adapter on every replica; returns when requests may name it.

        Args:
            again: it may take the place of one of the same name.

        Raises:
            InvalidRequest: the name is taken.
            StartError: it cannot be loaded; nothing has changed.
            Unavailable: no replica is up.
        """
        async with self._changes:
            if name in self._reserved:
                raise InvalidRequest(f"'{name}' is the model's own name; give the adapter another one")
            if name in self._known and not again:
                raise InvalidRequest(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True."
                )
            number = await _read(name, folder)
            await self._give(AdapterConfig(name, folder, number=number), executors)
            if await _read(name, folder) != number:  # ranks may have other factors than the number says
                self._take_back(number, executors)
                raise StartError(f"the files of the adapter '{name}' changed while it was loaded; load it again")
            self._forget(name)
            self._known[name] = AdapterConfig(name, folder, number=number)
            self._leaving = [each for each in self._leaving if each != number]
            self.names = tuple(self._known)
        self.settle(executors)
        log.info("the adapter '%s' was loaded", name)

    async def _give(self, adapter: AdapterConfig, executors: Sequence[Executor]) -> None:
        told = await asyncio.gather(*(each.load_adapter(adapter) for each in executors), return_exceptions=True)
        lost = [each for each in told if isinstance(each, WorkerLost)]  # their next ranks load it
        refusals = [each for each in told if isinstance(each, BaseException) and not isinstance(each, WorkerLost)]
        if not refusals and len(lost) < len(told):
            return
        self._take_back(adapter.number, executors)
        if refusals:
            raise refusals[0]
        raise Unavailable("the model's worker is being started again; load the adapter when it is up")

    def _take_back(self, number: int, executors: Sequence[Executor]) -> None:
        """Has an adapter forgotten that was not loaded, unless another name stands for the same one."""
        if number not in [*(each.number for each in self._known.values()), *self._leaving]:
            for executor in executors:
                executor.drop_adapter(number)

    async def unload(self, name: str, executors: Sequence[Executor]) -> None:
        """Takes an adapter out of service. Requests that began with it end with it.

        Raises:
            NotFound: there is none of this name.
        """
        async with self._changes:
            if name not in self._known:
                raise NotFound(f"The lora adapter '{name}' cannot be found.")
            self._forget(name)
        self.settle(executors)
        log.info("the adapter '%s' was unloaded", name)

    def _forget(self, name: str) -> None:
        before = self._known.pop(name, None)
        self.names = tuple(self._known)
        if before is not None and before.number not in [each.number for each in self._known.values()]:
            self._leaving.append(before.number)

    def settle(self, executors: Sequence[Executor]) -> None:
        """Lets go of adapters without a name that no request has any more."""
        if not self._leaving:
            return
        worn = dict.fromkeys(stream.sequence.adapter for stream in self._streams.all())
        for number in self._leaving:
            if number not in worn:
                for executor in executors:
                    executor.drop_adapter(number)
        self._leaving = [number for number in self._leaving if number in worn]

    def learn(self, replica: int, offer: ShardOffer) -> None:
        """Takes the contents of adapters from the ranks of a replica that were started. Requests that began with
        others are computed by what the ranks have now, so nothing of them is kept in files."""
        self._contents[replica] = {number: content and BY_CONTENT | content for number, content in offer.contents}
        for stream in self._streams.all():
            sequence = stream.sequence
            if sequence.content != self.content(sequence.adapter):
                sequence.content = 0

    def leave(self, replica: int) -> None:
        """Forgets what a replica that has ended has told."""
        self._contents.pop(replica, None)

    def check(self, loaded: Sequence[int], executors: Sequence[Executor]) -> None:
        """Takes out of service what new ranks could not load again, and fails the requests that have it.

        Args:
            loaded: numbers of those that they have.
        """
        gone = [each for each in self._known.values() if each.number >= BY_CONTENT and each.number not in loaded]
        for adapter in gone:
            log.error("the adapter '%s' could not be loaded again, and is not served any more", adapter.name)
            self._forget(adapter.name)
        for number in [number for number in self._leaving if number >= BY_CONTENT and number not in loaded]:
            for stream in self._streams.all():
                if stream.sequence.adapter == number:
                    stream.fail(Unavailable("its adapter could not be loaded again after a loss of the model's worker"))
                    self._streams.close(stream)
        if gone:
            self.settle(executors)
