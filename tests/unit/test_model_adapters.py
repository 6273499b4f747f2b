"""Adapters that come back with their model, while others come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from inflight.errors import StartError
from inflight.router.adapters import ModelAdapters
from inflight.router.language_models import LanguageModels


class Engine:
    """A model named "m" that loads adapters slowly, and "broken" not at all."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def info(self) -> Any:
        return SimpleNamespace(name="m", loaded=True, adapters=tuple(self.names))

    async def load_adapter(self, name: str, folder: Path, *, again: bool = False) -> None:
        await asyncio.sleep(0.01)
        if name == "broken":
            raise StartError("its files are gone")
        self.names = [*(each for each in self.names if each != name), name]

    async def unload_adapter(self, name: str) -> None:
        self.names.remove(name)


def test_what_comes_and_goes_while_a_model_is_loaded_again_is_so_behind_it() -> None:
    async def run() -> None:
        old, new = Engine(), Engine()
        models = SimpleNamespace(served={"m": old}, engine=lambda _name: old, on_prepared=None)
        unloaded: dict[str, str] = {}
        adapters = ModelAdapters(cast(LanguageModels, models), [], list, unloaded)
        adapters._at = lambda name, path, anywhere: Path(name)  # type: ignore[method-assign]
        for name in ("first", "second", "third"):
            await adapters.load(name, None, "m")
        adapters._came["m"]["broken"] = Path("broken")
        loading = asyncio.ensure_future(models.on_prepared(new))
        await asyncio.sleep(0.015)
        await adapters.unload("first", "m")
        await adapters.load("late", None, "m")
        await loading
        assert sorted(new.names) == sorted(old.names) == ["late", "second", "third"]
        assert list(unloaded) == ["first", "broken"]

    asyncio.run(asyncio.wait_for(run(), 10))
