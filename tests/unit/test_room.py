"""Who makes room for whom, with models that leave when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from inflight.config import DraftConfig, GeneratorConfig, RoomConfig, ServerConfig
from inflight.metrics import Metrics
from inflight.router.language_models import LanguageModels
from inflight.router.models import _size
from inflight.router.room import Present, Room


class Models:
    """What a server has loaded: bytes by name. `leaving`: those that answer their last requests."""

    def __init__(self, config: RoomConfig, **loaded: int) -> None:
        self.loaded = loaded
        self.leaving: dict[str, asyncio.Future[object]] = {}
        self.room = Room(config, self._present, self._end)

    def _present(self) -> list[Present]:
        return [Present(name, (), size, 0.0, False, False) for name, size in self.loaded.items()]

    async def _end(self, name: str) -> asyncio.Future[object]:
        del self.loaded[name]
        self.leaving[name] = asyncio.get_running_loop().create_future()
        return self.leaving[name]

    async def load(self, name: str, size: int) -> None:
        await self.room.make(name, size)
        self.loaded[name] = size
        await self.room.loaded(name)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_model_that_leaves_slowly_holds_up_only_who_comes_in_its_place() -> None:
    async def test() -> None:
        models = Models(RoomConfig(max_loaded=2), a=1, b=1)
        first = asyncio.ensure_future(models.load("c", 1))
        second = asyncio.ensure_future(models.load("d", 1))
        await settled()
        assert list(models.leaving) == ["a", "b"]
        models.leaving["b"].set_result(None)
        await second
        assert not first.done()
        assert list(models.loaded) == ["d"]
        models.leaving["a"].set_result(None)
        await first

    run(test)


def test_memory_is_free_when_the_processes_that_had_it_have_ended() -> None:
    """A model may come in the room that another one's victim leaves over, but not before it has left."""

    async def test() -> None:
        models = Models(RoomConfig(max_loaded_memory=10), a=8, b=1)
        first = asyncio.ensure_future(models.load("c", 3))
        second = asyncio.ensure_future(models.load("d", 4))
        third = asyncio.ensure_future(models.load("e", 1))
        await settled()
        assert list(models.leaving) == ["a"]
        assert not any(task.done() for task in (first, second, third))
        models.leaving["a"].set_result(None)
        await asyncio.gather(first, second, third)
        assert sum(models.loaded.values()) == 9

    run(test)


def test_memory_of_what_was_idle_is_free_when_its_processes_have_ended() -> None:
    async def test() -> None:
        models = Models(RoomConfig(max_loaded_memory=10, idle_timeout=0.05), a=8)
        models.room.begin()
        while "a" not in models.leaving:
            await asyncio.sleep(0.01)
        small, large = (asyncio.ensure_future(models.load(name, size)) for name, size in (("b", 2), ("c", 3)))
        await small
        await settled()
        assert not large.done()
        models.leaving["a"].set_result(None)
        await large
        models.room.stop()

    run(test)


def test_a_load_that_is_given_up_leaves_the_others_their_ends() -> None:
    async def test() -> None:
        models = Models(RoomConfig(max_loaded=1), a=1)
        first = asyncio.ensure_future(models.load("b", 1))
        await settled()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert not models.leaving["a"].cancelled()
        await models.load("c", 1)  # its room is free again

    run(test)


def test_what_is_measured_are_processes_of_this_machine() -> None:
    """Those of a cluster have numbers that mean other processes here."""

    async def test() -> None:
        models = LanguageModels(ServerConfig(), Metrics())
        engine = cast(Any, object())
        models._served["m"] = engine
        groups: list[Any] = [SimpleNamespace(elastic=True, pids=[1]), SimpleNamespace(elastic=False, pids=[7, 8])]
        models._shards[engine] = groups
        assert models.pids("m") == [7, 8]

    run(test)


def test_what_a_model_takes_is_known_of_its_files(tmp_path: Path) -> None:
    """Those of its draft model, too."""
    for name, size in (("large", 3000), ("small", 200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    draft = DraftConfig(tmp_path / "small")
    assert _size(GeneratorConfig.of(tmp_path / "large", "m", draft_model=draft)) == 3200
    assert _size(GeneratorConfig.of(tmp_path / "large", "m")) == 3000
