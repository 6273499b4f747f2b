"""LoRA adapters that come and go while their language models serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inflight.checkpoint import is_adapter
from inflight.contract import KnownModel, ModelState, ServableStatus
from inflight.errors import InflightError, InvalidRequest, NotFound
from inflight.repository import find_adapter, inside
from inflight.router.language_models import LanguageModels

if TYPE_CHECKING:
    from inflight.engine import Engine

log = logging.getLogger("inflight")

REMEMBERED = 4096
"""Names of what was unloaded that are remembered at most."""


def remember(unloaded: dict[str, str], names: Iterable[str], model: str) -> None:
    """Notes what is served no more. Args: model: as in `Models.unloaded`; empty: none has it any more."""
    for name in names:
        unloaded.pop(name, None)  # the latest are kept
        unloaded[name] = model
    while len(unloaded) > REMEMBERED:
        del unloaded[next(iter(unloaded))]


class ModelAdapters:
    """The adapters of all language models of a server. Lives on the server's event loop.

    Args:
        models: the language models.
        folders: in which the adapters that callers name lie.
        statuses: returns what is served.
        unloaded: as `Models.unloaded`.
    """

    def __init__(
        self,
        models: LanguageModels,
        folders: Sequence[Path],
        statuses: Callable[[], Sequence[ServableStatus]],
        unloaded: dict[str, str],
    ) -> None:
        self._models = models
        self._folders = folders
        self._statuses = statuses
        self._unloaded = unloaded
        self._came: dict[str, dict[str, Path]] = {}  # by model: those that were loaded while it served
        models.on_prepared = self._come_back

    def known(self) -> list[KnownModel]:
        """The adapters that are loaded, for the index."""
        return [
            KnownModel(adapter, 1, ModelState.READY, f"an adapter of '{name}'")
            for name, generator in self._models.served.items()
            if generator.info.loaded
            for adapter in generator.info.adapters
        ]

    def has(self, name: str) -> bool:
        """Whether a model has an adapter of this name."""
        return self._owner(name) is not None

    async def asked(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Loads an adapter, or loads it again, as the parameters of a load say. Raises as `load`."""
        model, path = parameters["adapter_of"], parameters.get("path")
        if not isinstance(model, str) or parameters.get("version") or parameters.get("rolling"):
            raise InvalidRequest("'adapter_of' is the name of a language model, and goes with 'path' only")
        await self.load(name, None if path is None else str(path), model, again=True)

    async def load(
        self, name: str, path: str | None, model: str | None = None, *, again: bool = False, anywhere: bool = False
    ) -> None:
        """Loads an adapter; returns when requests may name it.

        Args:
            path: of the adapter in one of the folders; None: it lies there by its name.
            model: the language model; None: the only one.
            again: it may take the place of an adapter of this name, with which requests that have it go on.
            anywhere: the path need not lie in one of the folders.

        Raises:
            NotFound: there is no such language model, or no such adapter.
            InvalidRequest: the name is taken, or the path lies outside the folders.
            StartError: it cannot be loaded; nothing has changed.
        """
        owner = model or self._only()
        engine = self._models.engine(owner)
        place = await asyncio.to_thread(self._at, name, path, anywhere)
        taken = any(name == status.name for status in self._statuses())
        if taken or self._owner(name) not in (None, owner):
            raise InvalidRequest(f"'{name}' is served already; give the adapter another name")
        await engine.load_adapter(name, place, again=again)
        self._came.setdefault(owner, {})[name] = place

    async def unload(self, name: str, model: str | None = None) -> None:
        """Takes an adapter out of service; requests that began with it end with it.

        Args:
            model: the language model; None: the one that has it.

        Raises:
            NotFound: there is none of this name.
        """
        owner = model or self._owner(name)
        if owner is None:
            raise NotFound(f"The lora adapter '{name}' cannot be found.")
        engine: Engine = self._models.engine(owner)
        await engine.unload_adapter(name)
        self._came.get(owner, {}).pop(name, None)
        remember(self._unloaded, [name], "")

    async def _come_back(self, engine: Engine) -> None:
        """Loads what a model had beside its own before it was loaded again. What cannot be loaded is missed, as if it
        had been unloaded. What serves in its place meanwhile may get and lose adapters, and so does the model then."""
        came = self._came.setdefault(engine.info.name, {})
        tried: dict[str, Path] = {}
        while missing := [(name, place) for name, place in came.items() if tried.get(name) != place]:
            name, place = missing[0]
            tried[name] = place
            try:
                await engine.load_adapter(name, place, again=True)
            except InflightError as error:
                log.error("the adapter '%s' does not come back with its model: %s", name, error)
                remember(self._unloaded, [name], "")
        for name in tried:
            if name not in came and name in engine.info.adapters:
                await engine.unload_adapter(name)

    def _owner(self, adapter: str) -> str | None:
        """The name of the model that has an adapter of this name; None: none has."""
        served = self._models.served.items()
        return next((name for name, generator in served if adapter in generator.info.adapters), None)

    def _only(self) -> str:
        names = list(self._models.served)
        if len(names) != 1:
            told = f"one of: {', '.join(names)}" if names else "but none is served"
            raise InvalidRequest(f"name the `model` that the adapter is for, {told}")
        return names[0]

    def _at(self, name: str, path: str | None, anywhere: bool) -> Path:
        if path is None:
            found = find_adapter(name, self._folders)
            if found is None:
                where = ", ".join(map(str, self._folders)) or "none, start the server with --repository DIR"
                raise NotFound(f"there is no adapter '{name}' in the folders of models: {where}; name its path")
            return found
        if anywhere:
            return Path(path).absolute()
        places = [folder / path for folder in self._folders]
        held = [place for place in places if inside(place, self._folders)]
        if not held:
            raise InvalidRequest(f"'{path}' lies in none of the folders of models; add its folder with --repository")
        adapter = next((place for place in held if is_adapter(place)), None)
        if adapter is None:
            raise NotFound(
                f"'{path}' is no adapter; give a folder with adapter_config.json, or a GGUF file (general.type adapter)"
            )
        return adapter
