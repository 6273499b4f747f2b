"""The language models of one server: announces, starts and stops their engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

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
    Row,
    ServableStatus,
)
from inflight.errors import ConfigError, DeadlineExceeded, InflightError, Loading, NotFound, Overloaded
from inflight.metrics import Load, Metrics, ReplicaLoad
from inflight.router.request import Result, SayTo
from inflight.router.stage import GENERATE, generate_method, run_stage
from inflight.startup import ProgressBar, aside, failed_load, weight_bytes

if TYPE_CHECKING:
    from inflight.engine import Engine, ShardGroup

LONGEST = 24 * 3600.0
"""Seconds after which a request without a deadline of its own is given up."""


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
    """Language models by servable name, in the order of their announcement."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._engines: dict[str, Engine] = {}
        self._groups: dict[str, list[ShardGroup]] = {}  # one for each replica
        self._served: dict[str, Generator] = {}  # an engine takes its announcement's place once it is loaded

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

    def statuses(self) -> list[ServableStatus]:
        return [self._status(name, generator) for name, generator in self._served.items()]

    def _status(self, name: str, generator: Generator) -> ServableStatus:
        replicas = self._engines[name].replicas if name in self._engines else [generator.ready]
        return ServableStatus(
            name=name,
            version=1,
            methods=(_generate_method(generator.info),),
            ready=generator.ready,
            replicas=len(replicas),
            ready_replicas=sum(replicas),
            loaded=generator.info.loaded,
        )

    def method(self, name: str, version: int, method: str) -> MethodInfo | None:
        """The method `generate` of a model; None for other methods, other versions and unknown models.

        Raises:
            Loading: the model is not loaded yet.
        """
        generator = self._served.get(name)
        if generator is None or method != GENERATE or version not in (NEWEST, 1):
            return None
        if isinstance(generator, Announced):
            raise generator.loading()
        return _generate_method(generator.info)

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
        engine = self._engines[method.servable]
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
                run_stage(engine, row, partial(settle, index), partial(say, index) if say else None, reported=True)
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
        self._metrics.generations.watch(self._load, self._replicas)
        started: list[str] = []
        try:
            for config in configs:
                if config.name in self._engines or config.name not in self._served:
                    self.announce([config])
                self._engines[config.name] = await self._opened(await config.fetched(), ahead=not started)
                started.append(config.name)
            # One after the other: each measures the memory that is left.
            for name in started:
                await self._engines[name].start()
                self._served[name] = self._engines[name]
        except BaseException:
            for config in configs:
                if config.name in started or isinstance(self._served.get(config.name), Announced):
                    del self._served[config.name]
            for name in started:
                await self._engines.pop(name).stop()
                del self._groups[name]
            raise

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

        replicas = [config.of_replica(number) for number in range(config.replicas)]
        self._groups[config.name] = groups = [
            ShardGroup(one, self._config, partial(_progress, one)) for one in replicas
        ]
        folder = config.model.model_dir
        for shards in groups if ahead else ():
            shards.begin()
        try:
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
            return Engine(config, tokenizer, groups, self._config.restart, self._metrics, vision)
        except BaseException:
            await asyncio.gather(*(shards.give_up() for shards in groups))
            self._groups.pop(config.name, None)
            raise

    def _load(self) -> Load:
        """The sum over all models."""
        loads = [engine.load for engine in self._engines.values()]
        return Load(
            sum(load.running for load in loads),
            sum(load.waiting for load in loads),
            sum(load.tokens for load in loads),
            sum(load.room for load in loads),
        )

    def _replicas(self) -> list[ReplicaLoad]:
        return [load for engine in self._engines.values() for load in engine.replica_loads]

    async def restart_replicas(self, name: str | None = None) -> None:
        """Starts the ranks of a model, or of all one after the other, again, without losing a request; as
        `Engine.restart_replicas`.

        Raises:
            NotFound: there is no such model.
        """
        if name is not None and name not in self._engines:
            raise NotFound(f"no language model is named '{name}'; served here: {', '.join(self._engines) or 'none'}")
        for engine in [self._engines[name]] if name is not None else list(self._engines.values()):
            await engine.restart_replicas()

    async def stop(self) -> None:
        # Those whose tokenizer is not read yet.
        begun = [group for name, groups in self._groups.items() if name not in self._engines for group in groups]
        engines = self._engines.values()
        await asyncio.gather(
            *(engine.stop(self._config.stop_timeout) for engine in engines),
            *(group.give_up() for group in begun),
        )

    def kill(self) -> None:
        """Kills every rank, at once."""
        for groups in self._groups.values():
            for group in groups:
                group.kill()

    def pids(self, name: str) -> list[int]:
        """Processes of one model's ranks."""
        return [pid for group in self._groups[name] for pid in group.pids]


def _generate_method(info: GeneratorInfo) -> MethodInfo:
    return generate_method(info.name, info.image_placeholder is not None)


def _progress(config: GeneratorConfig) -> ProgressBar:
    """The progress bar of a model's weights."""
    replica = f" of replica {config.replica}" if config.replicas > 1 else ""
    return ProgressBar(f"{config.name}, weights{replica}", weight_bytes(config.model.model_dir))
