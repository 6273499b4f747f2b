"""The repository of a server: the models that it knows, their states, loading and unloading while it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from inflight.config import GeneratorConfig, ServableConfig, ServerConfig, check
from inflight.contract import NEWEST, Generator, KnownModel, ModelState, ServableStatus
from inflight.errors import ConfigError, InflightError, InvalidRequest, NotFound, StartError
from inflight.repository import Found, ModelConfiguration, chosen, configurations, inside, look, scan
from inflight.router.adapters import ModelAdapters, remember
from inflight.router.fleet import Fleet
from inflight.router.room import MADE_ROOM, Present, Room
from inflight.router.watcher import Watcher
from inflight.startup import one_line, weight_bytes

log = logging.getLogger("inflight")

UNLOADED = "unloaded"
"""The reason in the index of a model that was unloaded, in Triton's word."""
SCANNED = 1.0
"""Seconds for which requests that name unknown models share one look at the folders."""
_PARAMETERS = ("version", "path", "rolling", "adapter_of", "unload_dependents")


class _Model:
    """One name in the repository.

    Attributes:
        configs: what it was last started with; empty: it never was, or it is found in a folder.
        loading: versions that are being loaded.
        unloading: versions that answer their last requests.
        failure: why the last load failed.
        was_loaded: it has served before.
        gone: why it was unloaded: `UNLOADED`, because somebody asked for it, or `MADE_ROOM`.
        files: bytes of its files.
        ended: of the last unload, done when its processes have ended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.configs: list[ModelConfiguration] = []
        self.loading: list[int] = []
        self.unloading: list[int] = []
        self.failure = ""
        self.was_loaded = False
        self.gone = UNLOADED
        self.files = 0
        self.ended: asyncio.Future[Any] | None = None
        self.changes = asyncio.Lock()  # one load or unload at a time


class Models:
    """Loads and unloads models while the server serves. Lives on the server's event loop.

    Args:
        fleet: holds what runs.
        config: the folders, and how long requests of an unloaded model may take.
        values: the options that a loaded model is configured with, by key.
        statuses: returns what is served.

    Attributes:
        unloaded: what was unloaded, or replaced by others: names and ids of models, names of versions and of adapters;
            each with the model that a request for it needs, if there is one. What serves again may be among them.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: ServerConfig,
        values: Mapping[str, Any],
        statuses: Callable[[], Sequence[ServableStatus]],
    ) -> None:
        self._fleet = fleet
        self.unloaded: dict[str, str] = {}
        self.adapters = ModelAdapters(fleet.language_models, config.repositories, statuses, self.unloaded)
        self._config = config
        self._values = values
        self._statuses = statuses
        self._models: dict[str, _Model] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # keeps them alive; their order does not matter
        self._watching: asyncio.Task[None] | None = None
        self.room = Room(config.room, self._present, lambda name: self.end(name, MADE_ROOM))
        self._look: asyncio.Task[dict[str, Found]] | None = None
        self._looked = 0.0

    def know(self, configs: Sequence[ModelConfiguration]) -> None:
        """Notes models that the server starts with, so that they can be loaded again."""
        self.room.begin()
        for config in configs:
            model = self._model(config.name)
            model.configs = [
                *(
                    each
                    for each in model.configs
                    if each.version != config.version and not isinstance(each, GeneratorConfig)
                ),
                config,
            ]
            model.files = self._size(model.configs)

    def watch(self) -> None:
        """Begins to follow the folders, where the configuration says so."""
        seconds = self._config.watch
        if seconds and self._config.repositories and self._watching is None:
            watcher = Watcher(seconds, self._found, lambda name: self.load(name, {}), self.end)
            self._watching = asyncio.get_running_loop().create_task(watcher.run())

    def stop(self) -> None:
        """Ends what `watch` began, and what looks for idle models."""
        self.room.stop()
        if self._watching is not None:
            self._watching.cancel()

    # The index

    async def index(self) -> list[KnownModel]:
        """Every version that is served, loads, or cannot be loaded, then the other models of the folders."""
        found = await asyncio.to_thread(self._found)  # folders may be slow
        served: dict[str, list[ServableStatus]] = {}
        for status in self._statuses():
            served.setdefault(status.name, []).append(status)
        names = dict.fromkeys([*served, *self._models, *found])
        entries = [entry for name in names for entry in self._entries(name, served.get(name, []))]
        return [*entries, *self.adapters.known()]

    def _entries(self, name: str, served: Sequence[ServableStatus]) -> list[KnownModel]:
        model = self._models.get(name) or _Model(name)
        failed = f"the last load failed: {model.failure}" if model.failure else ""
        entries = [KnownModel.of(status, failed) for status in served]
        numbers = [status.version for status in served]
        entries += [
            KnownModel(name, version, state)
            for versions, state in ((model.loading, ModelState.LOADING), (model.unloading, ModelState.UNLOADING))
            for version in versions
            if version not in numbers
        ]
        if entries:
            return entries
        version = max((config.version for config in model.configs), default=NEWEST)
        if failed:
            return [KnownModel(name, version, ModelState.UNAVAILABLE, model.failure)]
        if model.was_loaded:
            return [KnownModel(name, version or 1, ModelState.UNAVAILABLE, model.gone)]
        return [KnownModel(name, NEWEST, ModelState.KNOWN)]

    async def wanted(self, names: Sequence[str], on_demand: bool) -> str | None:
        """The first model that a request with these names may load: one that was unloaded to make room, and one in the
        folders. What somebody has unloaded stays so.

        Args:
            on_demand: models that were never loaded, too.
        """
        models = [(name, self.unloaded.get(name)) for name in names]
        for name in [each for pair in models for each in pair if each]:
            model = self._models.get(name)
            if model is not None and (model.was_loaded or model.configs):
                return name if model.gone == MADE_ROOM or not model.was_loaded or model.loading else None
            if on_demand and name in await self._seen():
                return name
        return None

    async def language_models(self, on_demand: bool) -> list[str]:
        """The language models that a request may load, as in `wanted`."""
        names = [name for name, model in self._models.items() if any(_is_language(each) for each in model.configs)]
        if on_demand:
            names += [name for name, found in (await self._seen()).items() if found.language]
        return [name for name in dict.fromkeys(names) if await self.wanted([name], on_demand) is not None]

    def serves(self, name: str) -> bool:
        """Whether a model is loaded, in whichever version."""
        return any(status.loaded for status in self._statuses() if status.name == name)

    @property
    def served_language_models(self) -> list[str]:
        """The language models that are served, each version under its name."""
        return list(self._fleet.language_models.served)

    async def _seen(self) -> Mapping[str, Found]:
        """The models of the folders as they were a moment ago."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked >= SCANNED):
            self._looked = time.monotonic()
            self._look = asyncio.get_running_loop().create_task(asyncio.to_thread(self._found))
        return await asyncio.shield(self._look)  # one look for all, whoever of them leaves

    def _present(self) -> list[Present]:
        """The models that are loaded."""
        fleet, found = self._fleet, []
        loading = {status.name for status in self._statuses() if not status.loaded}
        for name in fleet.bases:
            model = self._model(name)
            found.append(
                Present(
                    name,
                    fleet.pids(name),
                    model.files,
                    fleet.used(name),
                    fleet.busy(name),
                    model.changes.locked() or name in loading,
                )
            )
        return found

    def _found(self) -> dict[str, Found]:
        found: dict[str, Found] = {}
        for folder in self._config.repositories:
            for name, model in scan(folder).items():
                found.setdefault(name, model)
        return found

    def _size(self, configs: Sequence[ModelConfiguration]) -> int:
        """Bytes of the files of a model, of a servable those in its folder; 0 where nobody asks for them."""
        return sum(map(_size, configs)) if self._config.room.max_loaded_memory is not None else 0

    def _model(self, name: str) -> _Model:
        return self._models.setdefault(name, _Model(name))

    # Changes

    async def ensure(self, name: str) -> None:
        """Loads a model unless it is loaded, or being loaded. Raises as `load`."""
        async with self._model(name).changes:  # whoever loads or unloads it now comes first
            pass
        if name not in self._fleet.bases:
            await self.load(name, {})

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Loads a model of the repository, or loads it again. Returns when it answers. What serves under the name goes
        on until then, and for good where the load fails.

        Args:
            parameters: `version`: a number; `path`: of a model in one of the folders, which gets this name (a servable
                keeps that of its folder); `rolling`: true for a language model that serves, whose replicas are started
                again one after the other; `adapter_of`: the language model that `name` is a LoRA adapter for, which
                lies at `path`, or by its name in one of the folders.

        Raises:
            NotFound: no model of this name is known.
            InvalidRequest: a parameter that is not known, or a path outside the folders.
            ConfigError, StartError: it cannot be loaded; the index says why, too.
        """
        _check_parameters(parameters)
        if parameters.get("adapter_of"):
            await self.adapters.asked(name, parameters)
        elif parameters.get("rolling") not in (None, False):
            await self._renew(name, parameters)
        else:
            try:
                configs = await asyncio.to_thread(self._asked, name, parameters)
            except (ConfigError, StartError) as error:  # what lies in its folder is broken
                self._model(name).failure = one_line(error)
                raise
            await self.start(configs)

    async def _renew(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Starts the replicas of a language model again, with its files as they are now. Raises as `load`."""
        if parameters["rolling"] is not True or parameters.get("path") or parameters.get("version"):
            raise InvalidRequest(
                "the parameter 'rolling' must be true, and stands alone: it loads the same files again"
            )
        if name not in self._fleet.language_models.served:
            raise InvalidRequest(f"'{name}' is no language model that serves now; load it without 'rolling'")
        model = self._model(name)
        async with model.changes:
            try:
                await self._fleet.language_models.restart_replicas(name)
            except InflightError as error:
                log.error("a replica of '%s' cannot be loaded again: %s", name, error)
                raise

    async def start(self, configs: Sequence[ModelConfiguration]) -> None:
        """Loads versions of one model, wherever it lies; they take the place of what serves under its name.

        Args:
            configs: at least one, all of one name.

        Raises:
            ConfigError, StartError: it cannot be loaded; the index says why, too.
        """
        model = self._model(configs[0].name)
        async with model.changes:
            self._check_settled(model.name)
            model.loading = [config.version or 1 for config in configs]
            try:
                files = await asyncio.to_thread(self._size, configs)
                await self.room.make(model.name, files)
                await self._start(configs)
                await self.room.loaded(model.name)
            except InflightError as error:
                model.failure = one_line(error)
                log.error("model '%s' cannot be loaded: %s", model.name, error)
                raise
            finally:
                model.loading = []
                self.room.gave_up(model.name)
            model.configs, model.failure, model.was_loaded, model.files = list(configs), "", True, files
        log.info("model '%s' was loaded", model.name)

    async def _start(self, configs: Sequence[ModelConfiguration]) -> None:
        fleet, name = self._fleet, configs[0].name
        for config in configs:
            check(config)
        servables = [config for config in configs if isinstance(config, ServableConfig)]
        generators = [config for config in configs if isinstance(config, GeneratorConfig)]
        if servables and generators:
            raise ConfigError(f"'{name}' is a servable and a language model; rename one")
        models = fleet.language_models
        declared = [own for group in fleet.versions(name).values() for own in group.generators.values()]
        before = [each for each in models.all_of(name) if each not in declared]  # those end with their servable
        if servables:
            await fleet.load(servables)
        else:
            await models.take_over(name, generators)
            fleet.unload(name)
        for each in before:
            self._remember(name, each)
            self._keep(models.retire(each))

    def _remember(self, name: str, *generators: Generator) -> None:
        """Notes the names of what ends. Args: name: of the model, whose versions `generators` are."""
        remember(self.unloaded, [name], name)
        for each in generators:
            remember(self.unloaded, [each.info.name, each.info.model_id, *each.info.adapters], name)

    def at(self, path: Path, version: int = NEWEST, **fields: Any) -> list[ModelConfiguration]:
        """The configuration of a model at any path.

        Raises:
            ConfigError: there is none, or not in this version.
        """
        found = look(path.absolute())
        if found is None:
            raise ConfigError(f"'{path}' is no model; give a servable, a model file or a language model")
        if version and version not in found.versions:
            raise ConfigError(f"'{path}' has no version {version}; it has: {', '.join(map(str, found.versions))}")
        return configurations(found, [version or max(found.versions)], self._values, **fields)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Takes a model out of service. New requests are refused; those that it has are answered; then its processes
        end. That takes its time, and is not waited for.

        Raises:
            NotFound: no model of this name is known.
            InvalidRequest: a parameter that is not known.
        """
        _check_parameters(parameters)
        if name not in self._models and self.adapters.has(name):
            await self.adapters.unload(name)
            return
        ended = await self.end(name)
        self.room.leaves(name, self._model(name).files, ended)

    async def end(self, name: str, why: str = UNLOADED) -> asyncio.Future[Any]:
        """As `unload`. Returns what is done when its processes have ended. Args: why: it is in the index."""
        fleet, model = self._fleet, self._models.get(name)
        served = [status for status in self._statuses() if status.name == name]
        if model is None and not served and name not in await asyncio.to_thread(self._found):
            raise NotFound(f"there is no model '{name}' to unload; the index lists those that are known")
        model = self._model(name)
        async with model.changes:
            self._check_settled(name)
            served = [status for status in self._statuses() if status.name == name]
            generators = fleet.language_models.all_of(name)
            if served:
                self._remember(name, *generators)
            work: list[Any] = list(fleet.unload(name))
            for generator in fleet.language_models.all_of(name):
                fleet.language_models.withdraw(generator)
                work.append(self._keep(fleet.language_models.retire(generator)))
            if served or why == UNLOADED:
                model.gone = why
            if served:
                model.failure, model.was_loaded = "", True
                model.unloading = [status.version for status in served]
        if not work and model.ended is not None:
            return model.ended
        ended: asyncio.Future[Any] = asyncio.gather(*work)
        model.ended = ended
        ended.add_done_callback(lambda _: self._unloaded(model, ended))
        return ended

    def _check_settled(self, name: str) -> None:
        """Raises InvalidRequest: the model is being loaded with the server."""
        if any(not status.loaded for status in self._statuses() if status.name == name):
            raise InvalidRequest(f"the model '{name}' is being loaded with the server; try again when it is ready")

    def _unloaded(self, model: _Model, ended: asyncio.Future[Any]) -> None:
        error = None if ended.cancelled() else ended.exception()
        if model.ended is ended:
            model.unloading, model.ended = [], None
        if error is None:
            log.info("model '%s' was unloaded", model.name)
        elif not isinstance(error, asyncio.CancelledError):
            log.error("model '%s' did not end as it should: %s", model.name, error)

    def _keep(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _asked(self, name: str, parameters: Mapping[str, Any]) -> list[ModelConfiguration]:
        """The configurations of a model that a caller names."""
        path = parameters.get("path")
        if path is not None:
            found = self._at(Path(str(path)))
        else:
            listed = self._found().get(name)
            if listed is None:
                return self._again(name, parameters)
            found = listed
        version = _version(parameters)
        if version and version not in found.versions:
            has = ", ".join(map(str, found.versions))
            raise NotFound(f"the model '{name}' has no version {version}; it has: {has}")
        says = found.described
        policy = (says.versions if says is not None else "") or self._config.version_policy
        versions = [version] if version else chosen(policy, list(found.versions))
        if not versions:
            raise NotFound(
                f"the model '{name}' has none of the versions {policy}; it has: {', '.join(map(str, found.versions))}"
            )
        return self._with_ranks(name, configurations(found, versions, self._values, name=name))

    def _with_ranks(self, name: str, configs: list[ModelConfiguration]) -> list[ModelConfiguration]:
        """Folders do not say where the ranks of a distributed servable are: it keeps those that it had."""
        known = self._models[name].configs if name in self._models else []
        ranks = next(
            (each.ranks for each in known if isinstance(each, ServableConfig) and each.ranks is not None), None
        )
        if ranks is None:
            return configs
        return [
            msgspec.structs.replace(each, ranks=ranks) if isinstance(each, ServableConfig) else each for each in configs
        ]

    def _again(self, name: str, parameters: Mapping[str, Any]) -> list[ModelConfiguration]:
        model = self._models.get(name)
        version = _version(parameters)
        configs = [config for config in model.configs if version in (NEWEST, config.version)] if model else []
        if not configs:
            folders = ", ".join(map(str, self._config.repositories)) or "none, start the server with --repository DIR"
            of_version = f"version {version} of " if version else ""
            raise NotFound(f"there is no {of_version}model '{name}' to load; the folders of models: {folders}")
        return configs

    def _at(self, path: Path) -> Found:
        # Relative to the folders; the path itself where it is absolute.
        places = [folder / path for folder in self._config.repositories]
        held = [place for place in places if inside(place, self._config.repositories)]
        if not held:
            raise InvalidRequest(f"'{path}' lies in none of the folders of models; add its folder with --repository")
        for place in held:
            if (found := look(place)) is not None:
                return found
        raise NotFound(f"'{path}' is no model; give a servable, a model file or a language model")


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise InvalidRequest(
                f"the parameter '{name}' is not supported: put the model's files and its settings into the folder of "
                "models and load it by its name"
            )
        if name not in _PARAMETERS:
            raise InvalidRequest(f"there is no parameter '{name}' of a load; there are: {', '.join(_PARAMETERS)}")


def _version(parameters: Mapping[str, Any]) -> int:
    """The version that is asked for; NEWEST: none."""
    given = parameters.get("version")
    if given in (None, ""):
        return NEWEST
    text = str(given)
    if isinstance(given, bool) or not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidRequest("the parameter 'version' must be a number like 2")
    return int(text)


def _is_language(config: ModelConfiguration) -> bool:
    return isinstance(config, GeneratorConfig)


def _size(config: ModelConfiguration) -> int:
    try:
        if isinstance(config, GeneratorConfig):
            draft = config.model.draft_model
            return weight_bytes(config.model.model_dir) + (0 if draft is None else weight_bytes(draft.path))
        if config.model_file is not None:
            return config.model_file.stat().st_size
        return sum(file.stat().st_size for file in (config.directory / config.name).rglob("*") if file.is_file())
    except OSError:
        return 0
