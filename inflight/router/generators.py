"""The language models of one server: starts their engines, ends them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from inflight.config import GeneratorConfig, ServerConfig
from inflight.errors import ConfigError, DeadlineExceeded, InflightError, Overloaded, StartError
from inflight.metrics import Load, Metrics
from inflight.router.request import Result, SayTo
from inflight.router.stage import GENERATE, generate_method, run_stage
from inflight.types import NEWEST, MethodInfo, Outcome, Row, ServableStatus

if TYPE_CHECKING:
    from inflight.engine import Engine
    from inflight.router.shards import ShardGroup

LONGEST = 24 * 3600.0
"""Seconds after which a request without a deadline of its own is given up."""
SHOWN_STEPS = 4
"""Lines of progress while weights load."""


class Generators:
    """Engines by servable name, in the order of their start."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._engines: dict[str, Engine] = {}
        self._groups: dict[str, ShardGroup] = {}

    @property
    def engines(self) -> Mapping[str, Engine]:
        return self._engines

    @property
    def ready(self) -> bool:
        return all(engine.ready for engine in self._engines.values())

    def statuses(self) -> list[ServableStatus]:
        return [
            ServableStatus(
                name=name,
                version=1,
                methods=(generate_method(name),),
                ready=engine.ready,
                replicas=1,
                ready_replicas=int(engine.ready),
            )
            for name, engine in self._engines.items()
        ]

    def method(self, name: str, version: int, method: str) -> MethodInfo | None:
        """`generate` of one of the models, where that is what is meant."""
        known = method == GENERATE and version in (NEWEST, 1) and name in self._engines
        return generate_method(name) if known else None

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Result], None],
        timeout: float | None,
        say: SayTo | None,
    ) -> Callable[[], None]:
        """Generates for every row; as `CallbackBackend.submit`.

        Raises:
            Overloaded: more rows than the model takes at once.
        """
        engine = self._engines[method.servable]
        limit = engine.info.limits.max_concurrent_requests
        if engine.ready and engine.streams + len(rows) > limit:
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
                run_stage(engine, row, partial(settle, index), partial(say, index) if say else None, whole=True)
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
        try:  # not needed by a server of classic models only, and not part of its installation
            from inflight.engine import Engine
            from inflight.router.shards import ShardGroup
            from inflight.text import load_tokenizer
        except ImportError as error:
            raise StartError(
                f"language models need the extra 'llm': pip install 'inflight-serving[llm]' ({error})"
            ) from error
        self._metrics.generations.watch(self._load)
        started: list[str] = []
        try:
            for config in configs:
                if config.name in self._engines:
                    raise ConfigError(f"two language models are named '{config.name}'; rename one")
                tokenizer = await asyncio.get_running_loop().run_in_executor(
                    None, load_tokenizer, config.model_dir, config.tokenizer_config
                )
                shards = ShardGroup(config, self._config, _Progress(config.name))
                engine = Engine(config, tokenizer, shards, self._config.restart, self._metrics)
                self._engines[config.name] = engine
                self._groups[config.name] = shards
                started.append(config.name)
            # One after the other: each measures the memory that is left.
            for name in started:
                await self._engines[name].start()
        except BaseException:
            for name in started:
                await self._engines.pop(name).stop()
                del self._groups[name]
            raise

    def _load(self) -> Load:
        """Of all models together."""
        loads = [engine.load for engine in self._engines.values()]
        return Load(
            sum(load.running for load in loads),
            sum(load.waiting for load in loads),
            sum(load.tokens for load in loads),
            sum(load.room for load in loads),
        )

    async def stop(self) -> None:
        await asyncio.gather(*(engine.stop(self._config.stop_timeout) for engine in self._engines.values()))

    def pids(self, name: str) -> list[int]:
        """Processes of one model's ranks."""
        return self._groups[name].pids


class _Progress:
    """Says now and then how much of the weights is there."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown = 0

    def __call__(self, done: float) -> None:
        step = int(done * SHOWN_STEPS)
        if step != self._shown:
            self._shown = step
            if step:
                share = 100 * step // SHOWN_STEPS
                print(f"{self._name}: {share} % of the weights loaded", file=sys.stderr, flush=True)
