"""The language models of one server: announces, starts and stops their engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from inflight.admission import Admission
from inflight.config import GeneratorConfig, ServerConfig
from inflight.contract import (
    NEWEST,
    Chat,
    Event,
    GenerationLimits,
    GenerationRequest,
    Generator,
    GeneratorInfo,
    MethodInfo,
    Outcome,
    PieceOfText,
    Result,
    Row,
    SayTo,
    ServableStatus,
)
from inflight.errors import (
    ConfigError,
    DeadlineExceeded,
    InflightError,
    Loading,
    NotFound,
    Overloaded,
    StartError,
)
from inflight.metrics import Load, Metrics, PromptsShown, ReplicaLoad
from inflight.router.drain import drained
from inflight.router.machines import Machines
from inflight.router.stage import GENERATE, generate_method, run_stage
from inflight.router.texts import CLASSIFY, EMBED, SCORE, SPARSE, main_method, text_method
from inflight.startup import ProgressBar, aside, failed_load, weight_bytes

if TYPE_CHECKING:
    from inflight.engine import Engine, ShardGroup
    from inflight.place import Placement

log = logging.getLogger("inflight")

_METHODS = (GENERATE, EMBED, SPARSE, CLASSIFY, SCORE)
LONGEST = 24 * 3600.0
"""Seconds after which a request without a deadline of its own is given up."""


def beside(name: str, version: int) -> str:
    """The name of a version of a language model that is served beside a newer one."""
    return f"{name}:{version}"


class Announced:
    """A `Generator` in the place of a language model that is not loaded yet. Every request fails with `Loading`."""

    ready = False
    streams = 0

    def __init__(self, config: GeneratorConfig) -> None:
        self.info = GeneratorInfo(
            config.name,
            config.model_id or str(config.model.model_dir),
            GenerationLimits.of(config.limits, 0, 0),
            adapters=tuple(adapter.name for adapter in config.model.adapters),
            loaded=False,
        )
        self.admission = Admission(config.policy.max_concurrent_requests)

    def loading(self) -> Loading:
        """The error of every request."""
        return Loading(
            f"servable '{self.info.name}': servable is not available, the model is still being loaded; try again later"
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        raise self.loading()

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        raise self.loading()

    async def decode(self, ids: Sequence[int]) -> str:
        raise self.loading()

    async def render(self, chat: Chat) -> str:
        raise self.loading()


class LanguageModels:
    """Language models by servable name, in the order of their announcement.

    Args:
        machines: those of a cluster, which belong to the caller; None: they are used by nobody else.

    Attributes:
        on_prepared: called with a model that is loaded while the server serves, before anybody can call it.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, machines: Machines | None = None) -> None:
        self._config = config
        self._metrics = metrics
        # One group of ranks for each replica of every engine: of those that load, serve, or answer their last requests.
        self._shards: dict[Engine, list[ShardGroup]] = {}
        self._begun: list[ShardGroup] = []  # those whose tokenizer is being read, so that there is no engine yet
        self._served: dict[str, Generator] = {}  # an engine takes its announcement's place once it is loaded
        self._versions: dict[str, int] = {}
        self._bases: dict[str, str] = {}  # of a version beside the newest, `<name>:<version>`, the model's name
        self._one_loads = asyncio.Lock()  # each model measures the memory that is left
        self._machines = machines or Machines(config.cluster)
        self._stopping = False
        self.on_prepared: Callable[[Engine], Awaitable[None]] | None = None

    @property
    def served(self) -> Mapping[str, Generator]:
        """All models, those that are only announced included."""
        return self._served

    @property
    def ready(self) -> bool:
        return all(generator.ready for generator in self._served.values())

    def announce(self, configs: Sequence[GeneratorConfig]) -> None:
        """Registers models that `start` will load. Until then their requests fail with `Loading`.

        Raises:
            ConfigError: two have one name.
        """
        for config in configs:
            if config.name in self._served:
                raise ConfigError(f"two language models are named '{config.name}'; rename one")
            self._served[config.name] = Announced(config)
            self._versions[config.name] = config.version

    def statuses(self) -> list[ServableStatus]:
        return [self._status(name, generator) for name, generator in self._served.items()]

    def _status(self, name: str, generator: Generator) -> ServableStatus:
        engine = self._engine(generator)
        replicas = engine.replicas if engine is not None else [generator.ready]
        return ServableStatus(
            name=self._bases.get(name, name),
            version=self._versions[name],
            methods=(self._main(name, generator.info),),
            ready=generator.ready,
            replicas=len(replicas),
            ready_replicas=sum(replicas),
            loaded=generator.info.loaded,
        )

    def _engine(self, generator: Generator | None) -> Engine | None:
        """The engine that a served model is; None for one that is only announced."""
        return next((engine for engine in self._shards if engine is generator), None)

    def engine(self, name: str) -> Engine:
        """The loaded model of a name.

        Raises:
            NotFound: there is none.
            Loading: it is not loaded yet.
        """
        found = self._served.get(name)
        if found is None:
            raise NotFound(f"no language model is named '{name}'; served here: {', '.join(self._served) or 'none'}")
        engine = self._engine(found)
        if engine is None:
            raise Loading(f"the model '{name}' is still being loaded; try again later")
        return engine

    def method(self, name: str, version: int, method: str) -> MethodInfo | None:
        """A method of a model: `generate`, or one of `text_method`; None for others, other versions, unknown models.

        Raises:
            Loading: the model is not loaded yet.
        """
        own = self.named(name, version) if method in _METHODS else None
        if own is None:
            return None
        generator = self._served[own]
        if isinstance(generator, Announced):
            raise generator.loading()
        return self._method(own, generator.info, method)

    def has(self, name: str, version: int) -> bool:
        """Whether a model is served in this version."""
        return self.named(name, version) is not None

    def named(self, name: str, version: int) -> str | None:
        """The name under which this version of a model is served; None: it is not."""
        if name in self._served and version in (NEWEST, self._versions[name]):
            return name
        other = beside(name, version)
        return other if other in self._served else None

    def all_of(self, name: str) -> list[Generator]:
        """All versions of a model that are served."""
        return [each for own, each in self._served.items() if self._bases.get(own, own) == name]

    @property
    def bases(self) -> list[str]:
        """The names of all models, without versions."""
        return list(dict.fromkeys(self._bases.get(own, own) for own in self._served))

    def used(self, name: str) -> float:
        """Time of a model's last request by `time.perf_counter`; 0: there was none."""
        return max((each.admission.entered for each in self.all_of(name)), default=0.0)

    def busy(self, name: str) -> bool:
        """Whether a model answers requests, or some are on their way to it."""
        return any(_busy(engine) for each in self.all_of(name) if (engine := self._engine(each)) is not None)

    def _main(self, own: str, info: GeneratorInfo) -> MethodInfo:
        """The method that stands for the model."""
        found = self._method(own, info, main_method(info) or GENERATE)
        assert found is not None, "a model has what is its main method"
        return found

    def _method(self, own: str, info: GeneratorInfo, name: str) -> MethodInfo | None:
        servable, version = self._bases.get(own, own), self._versions.get(own, 1)
        if name != GENERATE:
            return text_method(info, servable, name, version)
        return generate_method(servable, info.image_placeholder is not None, version)

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Result], None],
        timeout: float | None,
        say: SayTo | None,
    ) -> Callable[[], None]:
        """Generates for every row; as `Backend.submit`.

        Raises:
            Overloaded: more rows than the model takes at once.
        """
        own = self.named(method.servable, method.version)
        engine = self._served.get(own or method.servable)  # whichever version: it may have been replaced
        if engine is None:
            raise NotFound(f"servable '{method.servable}': servable is not available, it was unloaded")
        limit = engine.info.policy.max_concurrent_requests
        if engine.admission.room < len(rows):
            raise Overloaded(f"the model takes {limit} generations at once; try again later, or send fewer instances")
        outcomes: list[Outcome] = [()] * len(rows)
        left = len(rows)

        def settle(index: int, result: Result) -> None:
            nonlocal left
            outcomes[index] = result if isinstance(result, InflightError) else result[0]
            left -= 1
            if not left:
                timer.cancel()
                done(outcomes)

        tasks = [
            asyncio.ensure_future(
                run_stage(engine, row, partial(settle, index), partial(say, index) if say else None, reported=method)
            )
            for index, row in enumerate(rows)
        ]

        def cancel() -> None:
            timer.cancel()
            for task in tasks:
                task.cancel()

        def expire() -> None:
            cancel()
            done(DeadlineExceeded(f"the request took longer than its {timeout:g} seconds"))

        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout if timeout is not None else LONGEST, expire)
        return cancel

    async def start(self, configs: Sequence[GeneratorConfig]) -> None:
        """Loads every model and returns when all can answer.

        Raises:
            ConfigError: two have one name.
            StartError: a model cannot be loaded; what this call started has been ended.
        """
        if not configs:
            return
        opened: list[Engine] = []
        try:
            async with self._one_loads:
                for config in configs:
                    if not isinstance(self._served.get(config.name), Announced):
                        self.announce([config])
                    opened.append(await self._opened(await config.fetched(), ahead=not opened))
                # One after the other: each measures the memory that is left.
                for engine in opened:
                    await engine.start()
                    self.install(engine, self._versions[engine.info.name])
        except BaseException:
            for config in configs:
                served = self._served.get(config.name)
                if isinstance(served, Announced) or served in opened:
                    del self._served[config.name]
            for engine in opened:
                await self._end(engine, 0)
            raise

    # Beside what serves

    async def prepare(self, config: GeneratorConfig) -> Engine:
        """Loads a model that nobody can call yet.

        Raises:
            StartError: it cannot be loaded; what this call started has been ended.
        """
        async with self._one_loads:
            if self._stopping:
                raise StartError("the server stops")
            engine = await self._opened(await config.fetched(), ahead=True)
            try:
                await engine.start()
                if self.on_prepared is not None:
                    await self.on_prepared(engine)
                if self._stopping:
                    raise StartError("the server stops")
            except BaseException:
                await self._end(engine, 0)
                raise
        return engine

    async def take_over(self, name: str, configs: Sequence[GeneratorConfig]) -> None:
        """Loads versions of a model and lets them serve under its name when all can answer: the newest under the name
        itself, the others beside it (`beside`). What served before is out of service then.

        Raises:
            StartError: one cannot be loaded; what this call started has been ended.
        """
        newest = max(config.version for config in configs)
        ready: list[tuple[GeneratorConfig, Engine]] = []
        try:
            for config in configs:
                own = name if config.version == newest else beside(name, config.version)
                told = msgspec.structs.replace(config, name=own, base=name if own != name else "")
                ready.append((told, await self.prepare(told)))
        except BaseException:
            for _, engine in ready:
                await self._end(engine, 0)
            raise
        for before in self.all_of(name):
            if all(before.info.name != config.name for config, _ in ready):
                self.withdraw(before)
        for config, engine in ready:
            self.install(engine, config.version)
            if config.name != name:
                self._bases[config.name] = name

    def install(self, generator: Generator, version: int = 1) -> None:
        """Lets a model serve under its name, in place of what did so before."""
        name = generator.info.name
        self._served[name] = generator
        self._versions[name] = version
        default = self._config.room.default_model
        if default is not None and default in self._served:  # requests that name no model go to the first one
            self._served = {default: self._served[default], **self._served}

    def withdraw(self, generator: Generator) -> None:
        """Takes a model out of service, unless another one has taken its place."""
        if self._served.get(generator.info.name) is generator:
            del self._served[generator.info.name]
            self._bases.pop(generator.info.name, None)

    async def retire(self, generator: Generator, seconds: float | None = None) -> None:
        """Ends a model that is out of service when it has answered its last requests.

        Args:
            seconds: the longest wait for these; None: the server's `drain_timeout`.
        """
        self.withdraw(generator)
        engine = self._engine(generator)
        if engine is None:
            return  # it was never loaded
        limit = self._config.drain_timeout if seconds is None else seconds
        if limit and not await drained(lambda: _busy(engine), limit):
            log.warning("%d generations of '%s' did not finish before it ended", engine.streams, engine.info.name)
        await self._end(engine, 0)

    async def _end(self, engine: Engine, grace: float) -> None:
        await engine.stop(grace)
        self._shards.pop(engine, None)

    async def _opened(self, config: GeneratorConfig, ahead: bool) -> Engine:
        """An engine that is still to be started.

        Args:
            ahead: its ranks begin to load while its tokenizer is read. Of several models only the first one's do: each
                measures the memory that is left.

        Raises:
            StartError: the tokenizer cannot be read, or the model's images are of an unknown kind.
        """
        # Imported here because a server without language models does not need them.
        from inflight.engine import Engine, ShardGroup
        from inflight.text import load_tokenizer
        from inflight.vision import open_vision

        self._metrics.generations.watch(self._load, self._replicas, self._prompts)
        replicas = [config.of_replica(number) for number in range(config.replicas)]
        places = await self._places(len(replicas))
        if any(place is not None for place in places):  # processors of other machines are not shared
            replicas = [msgspec.structs.replace(one, model=config.model) for one in replicas]
        groups = [ShardGroup(one, self._config, partial(_progress, one), at) for one, at in zip(replicas, places)]
        self._begun += groups
        folder = config.model.model_dir
        try:
            for shards in groups[: config.least] if ahead else ():
                shards.begin()
            try:
                read = partial(
                    load_tokenizer,
                    folder,
                    config.tokenizer_config,
                    config.tool_call_parser,
                    config.reasoning_parser,
                )
                tokenizer = await aside(read, "tokenizer")
            except Exception as error:  # the tokenizer's library raises anything for a broken file
                raise failed_load("the tokenizer", error, folder) from error
            vision = open_vision(config, self._config, self._metrics)
            engine = Engine(config, tokenizer, groups, self._config.restart, self._metrics, vision)
            self._shards[engine] = groups
            return engine
        except BaseException:
            await asyncio.gather(*(shards.give_up() for shards in groups))
            raise
        finally:
            self._begun = [shards for shards in self._begun if shards not in groups]

    async def _places(self, count: int) -> list[Placement | None]:
        """Where that many replicas run; None: on this machine.

        Raises:
            StartError: the cluster does not answer.
        """
        if not self._machines.elsewhere:
            return [None] * count
        from inflight.place import OnCluster

        cluster = await self._machines.cluster()
        return [OnCluster(cluster) for _ in range(count)]

    def _load(self) -> Load:
        """The sum over all models."""
        loads = [engine.load for engine in self._shards]
        reading = [load for engine, load in zip(self._shards, loads) if not engine.info.generates]
        return Load(
            sum(load.running for load in loads),
            sum(load.waiting for load in loads),
            sum(load.tokens for load in loads),
            sum(load.room for load in loads),
            sum(load.waiting for load in reading),
        )

    def _replicas(self) -> list[ReplicaLoad]:
        return [load for engine in self._shards for load in engine.replica_loads]

    def _prompts(self) -> list[PromptsShown]:
        return [one for engine in self._shards for one in engine.prompts]

    async def restart_replicas(self, name: str | None = None) -> None:
        """Starts the ranks of a model, or of all one after the other, again, without losing a request; as
        `Engine.restart_replicas`.

        Raises:
            NotFound: there is no such model.
        """
        if name is not None and name not in self._served:
            raise NotFound(f"no language model is named '{name}'; served here: {', '.join(self._served) or 'none'}")
        for generator in [self._served[name]] if name is not None else list(self._served.values()):
            engine = self._engine(generator)
            if engine is not None:
                await engine.restart_replicas()

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(
            *(engine.stop(self._config.stop_timeout) for engine in list(self._shards)),
            *(shards.give_up() for shards in list(self._begun)),
        )

    def kill(self) -> None:
        """Kills every rank, at once."""
        for shards in [*(each for groups in self._shards.values() for each in groups), *self._begun]:
            shards.kill()

    def pids(self, name: str) -> list[int]:
        """Processes of the ranks of one served model, in all its versions. Those of a cluster are not among them: their
        numbers are of other machines."""
        engines = [engine for each in self.all_of(name) if (engine := self._engine(each)) is not None]
        groups = [shards for engine in engines for shards in self._shards[engine] if not shards.elastic]
        return [pid for shards in groups for pid in shards.pids]


def _busy(engine: Engine) -> bool:
    """Whether a request is on its way to a model, or is being answered."""
    place = engine.admission
    return bool(engine.streams or place.used or place.arriving or place.uploading)


def _progress(config: GeneratorConfig) -> ProgressBar:
    """The progress bar of a model's weights."""
    replica = f" of replica {config.replica}" if config.replicas > 1 else ""
    return ProgressBar(f"{config.name}, weights{replica}", weight_bytes(config.model.model_dir))
