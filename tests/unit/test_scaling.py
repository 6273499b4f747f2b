"""How many replicas there are: the policy, and an engine whose number of replicas follows its queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from inflight.config import GeneratorConfig
from inflight.engine import Engine
from inflight.engine import replicas as replicas_module
from inflight.errors import ConfigError, StartError
from inflight.sched import Pressure, Scaler
from inflight.sched.scaling import wanted
from tests.fake_shards import FakeExecutor
from tests.unit.test_engine import QUICK, word_tokenizer
from tests.unit.test_replicas import answered


@pytest.mark.parametrize(
    ("seen", "calm", "count"),
    [
        (Pressure(1, 0, 0.0, 4, 8), 0, 1),
        (Pressure(1, 0, 1.5, 8, 8), 0, 2),  # somebody waits too long
        (Pressure(2, 1, 9.0, 8, 8), 0, 2),  # the one that is to help is on its way
        (Pressure(2, 0, 9.0, 16, 8), 0, 3),
        (Pressure(4, 0, 9.0, 32, 8), 0, 4),  # no more
        (Pressure(3, 0, 0.9, 24, 8), 0, 3),  # waits, but not too long
        (Pressure(3, 0, 0.0, 2, 8), 59, 3),
        (Pressure(3, 0, 0.0, 2, 8), 60, 2),
        (Pressure(1, 0, 0.0, 0, 8), 900, 1),  # no fewer
        (Pressure(0, 0, 0.0, 0, 8), 0, 1),
        (Pressure(3, 1, 0.0, 0, 8), 59, 3),
        (Pressure(3, 1, 0.0, 0, 8), 60, 2),  # the one that does not come is not needed
    ],
)
def test_the_policy(seen: Pressure, calm: float, count: int) -> None:
    assert wanted(seen, calm, 1, 4, 1.0, 60.0) == count


def test_calm_is_counted_from_when_fewer_were_enough() -> None:
    scaler = Scaler(1, 4, 1.0, 60.0)
    quiet, busy = Pressure(3, 0, 0.0, 4, 8), Pressure(3, 0, 0.0, 9, 8)
    assert [scaler.look(now, quiet) for now in (0, 59)] == [3, 3]
    assert scaler.look(59.5, busy) == 3  # the others' batches would be more than half full
    assert [scaler.look(now, quiet) for now in (60, 119, 120)] == [3, 3, 2]
    two = Pressure(2, 0, 0.0, 0, 8)
    assert [scaler.look(now, two) for now in (121, 180, 181)] == [2, 2, 1], "each has a time of its own"


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [
        ({}, 1, 1),
        ({"replicas": 3}, 3, 3),
        ({"max_replicas": 4}, 1, 4),
        ({"min_replicas": 2, "max_replicas": 4}, 2, 4),
        ({"min_replicas": 2}, 2, 2),
        ({"min_replicas": 1, "replicas": 3}, 1, 3),
        ({"max_replicas": 2, "replicas": 3}, 1, 2),
    ],
)
def test_bounds(given: dict[str, Any], least: int, most: int) -> None:
    config = GeneratorConfig.of(Path("/m"), **given)
    assert (config.least, config.replicas) == (least, most)


def test_one_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "LOOK", 0.01)

    async def test(engine: Engine, executors: list[Slow]) -> None:
        executors[1].may.clear()
        await engine.start()
        executors[0].pace = 0.002
        tasks = [asyncio.ensure_future(answered(engine, [number] * 20, 20)) for number in range(20)]
        await until(lambda: engine.replicas == [True, False])
        await asyncio.gather(*tasks)
        await until(lambda: engine.replicas == [True])
        await until(lambda: executors[1].closes == 1)
        executors[1].may.set()
        await answered(engine, [1, 2])

    serve(test, lambda: [Slow(), Slow()], max_replicas=2, queue_time=0.02, idle_time=0.05)


def test_bounds_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="min_replicas 5 is more than max_replicas 4"):
        GeneratorConfig.of(Path("/m"), min_replicas=5, max_replicas=4)


class Slow(FakeExecutor):
    """Shards that load when they may."""

    def __init__(self, elastic: bool = False) -> None:
        super().__init__()
        self.room = 10**9
        self.elastic = elastic
        self.may = asyncio.Event()
        self.may.set()
        self.closes = 0

    async def start(self, num_blocks: int | None = None) -> Any:
        await self.may.wait()
        return await super().start(num_blocks)

    async def close(self) -> None:
        self.closes += 1
        await super().close()


def serve(
    test: Callable[[Engine, list[Slow]], Awaitable[None]],
    executors: Callable[[], list[Slow]],
    **fields: Any,
) -> None:
    async def main() -> None:
        made = executors()
        config = GeneratorConfig.of(Path("fake"), "fake", max_batch_size=4, **fields)
        engine = Engine(config, word_tokenizer(), made, QUICK)
        try:
            await asyncio.wait_for(test(engine, made), 60)
            assert not engine.streams
        finally:
            await engine.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def numbers(engine: Engine) -> list[int]:
    return [lane.number for lane in engine._lanes.all]


def test_replicas_follow_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst gets more of them, calm ends them again, and nobody's answer changes."""
    monkeypatch.setattr(replicas_module, "LOOK", 0.01)

    async def test(engine: Engine, executors: list[Slow]) -> None:
        await engine.start()
        assert (engine.replicas, [each.starts for each in executors]) == ([True], [1, 0, 0])
        for executor in executors:
            executor.pace = 0.002
        executors[1].may.clear()
        tasks = [asyncio.ensure_future(answered(engine, [number] * 20, 30)) for number in range(60)]
        await until(lambda: engine.replicas == [True, False])
        await asyncio.sleep(0.1)
        assert executors[2].starts == 0, "one after the other"
        executors[1].may.set()
        await until(lambda: engine.replicas == [True] * 3)
        await asyncio.gather(*tasks)
        assert min(lane.placed + lane.taken_over for lane in engine._lanes.all) >= 4
        assert len(engine.replica_loads) == 3
        # One request runs on while the others end.
        steady = asyncio.ensure_future(answered(engine, [1, 2, 3], 300))
        await until(lambda: len(numbers(engine)) == 1)
        assert sum(executor.closes for executor in executors) == 2
        assert not steady.done()
        await steady
        await answered(engine, [5, 6])

    serve(test, lambda: [Slow() for _ in range(3)], max_replicas=3, queue_time=0.03, idle_time=0.05)


def test_no_replica_ends_while_all_are_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one whose ranks are not there would be the first to go, and the restart would fail."""
    monkeypatch.setattr(replicas_module, "LOOK", 0.01)

    async def test(engine: Engine, executors: list[Slow]) -> None:
        await engine.start()
        executors[0].pace = 0.002
        await asyncio.gather(*(answered(engine, [number] * 20, 20) for number in range(20)))
        await until(lambda: engine.replicas == [True] * 2)
        executors[0].may.clear()
        restart = asyncio.ensure_future(engine.restart_replicas())
        await until(lambda: engine.replicas == [False, True])
        await asyncio.sleep(0.6)  # longer than two idle times
        assert numbers(engine) == [0, 1]
        executors[0].may.set()
        await restart
        assert [executor.starts for executor in executors] == [2, 2]
        await until(lambda: len(numbers(engine)) == 1)

    serve(test, lambda: [Slow(), Slow()], max_replicas=2, queue_time=0.02, idle_time=0.25)


def test_running_requests_of_one_that_ends_go_on_elsewhere() -> None:
    async def test(engine: Engine, executors: list[Slow]) -> None:
        await engine.start()
        for executor in executors:
            executor.pace = 0.002
        tasks = [asyncio.ensure_future(answered(engine, [number] * 9, 50)) for number in range(6)]
        await until(lambda: min(lane.scheduler.running for lane in engine._lanes.all) >= 2)
        assert await engine._lanes.retire(engine._lanes.all[0], grace=0.0)
        assert (numbers(engine), executors[0].closes) == ([1], 1)
        await asyncio.gather(*tasks)
        # The last one cannot go while it has a request: nobody else is there to take it.
        task = asyncio.ensure_future(answered(engine, [7] * 9, 50))
        await until(lambda: engine.running == 1)
        assert not await engine._lanes.retire(engine._lanes.all[0], grace=0.0)
        await task
        assert (numbers(engine), executors[1].starts) == ([1], 2)

    serve(test, lambda: [Slow(), Slow()], replicas=2)


def test_where_machines_come_and_go_one_replica_is_enough_to_begin() -> None:
    async def test(engine: Engine, executors: list[Slow]) -> None:
        executors[0].may.clear()
        executors[2].may.clear()
        await engine.start()
        assert (engine.ready, engine.replicas) == (True, [True, False, False])
        await answered(engine, [1, 2, 3])
        executors[0].failing_starts = 2  # it is tried again
        executors[0].may.set()
        await until(lambda: engine.replicas == [True, True, False])
        assert (numbers(engine), executors[0].starts) == ([0, 1], 3)
        await asyncio.gather(*(answered(engine, [number] * 8) for number in range(8)))

    serve(test, lambda: [Slow(elastic=True) for _ in range(3)], replicas=3)


def test_a_model_that_cannot_load_is_told_of_at_once() -> None:
    async def test(engine: Engine, executors: list[Slow]) -> None:
        executors[0].may.clear()
        executors[1].failing_starts = 1
        with pytest.raises(StartError, match="it does not start"):
            await engine.start()

    serve(test, lambda: [Slow(elastic=True) for _ in range(2)], replicas=2)
