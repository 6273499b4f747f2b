"""Replicas of a language model over shards without one: who gets a request, and what becomes of it after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inflight.commands import resolve
from inflight.commands import serve as serve_command
from inflight.config import GeneratorConfig
from inflight.contract import GenerationRequest, Sampling, Start, Token, whole
from inflight.engine import Engine
from inflight.errors import StartError, Unavailable, WorkerLost
from inflight.llm import LLM
from inflight.metrics import Metrics
from inflight.place import shard_job, shares
from inflight.sched import Bid, cheapest
from tests.fake_shards import FakeExecutor, expected
from tests.fake_vision import FakeVision, image
from tests.lm import POCKET
from tests.unit.test_engine import QUICK, collect, word_tokenizer
from tests.unit.test_engine_images import asked, ids, wanted


def serve(test: Callable[[Engine, list[FakeExecutor]], Awaitable[None]], count: int = 2, **limits: Any) -> None:
    """Runs a test against a started engine, and looks that nothing of it is left."""

    async def main() -> None:
        executors = [FakeExecutor() for _ in range(count)]
        config = GeneratorConfig.of(Path("fake"), "fake", replicas=count, **limits)
        engine = Engine(config, word_tokenizer(), executors, QUICK)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine, executors), 60)
            for _ in range(500):
                schedulers = [lane.scheduler for lane in engine._lanes.all]
                if not engine.streams and not any(each.in_flight or each.requests for each in schedulers):
                    break
                await asyncio.sleep(0.01)
            assert not engine.streams
            for scheduler in schedulers:
                assert not scheduler.requests
                scheduler.plan()
                assert scheduler.pool.free == scheduler.pool.count, "blocks are lost"
        finally:
            await engine.stop()

    asyncio.run(main())


def placed(engine: Engine) -> list[int]:
    return [lane.placed for lane in engine._lanes.all]


def taken(engine: Engine) -> list[int]:
    return [lane.taken_over for lane in engine._lanes.all]


async def answered(engine: Engine, prompt: Sequence[int], count: int = 4, **asked: Any) -> Start:
    """Generates and compares; how it began."""
    events = engine.generate(GenerationRequest(list(prompt), max_new_tokens=count, **asked))
    start = await anext(events)
    assert isinstance(start, Start)
    assert [event.info.id async for event in events if isinstance(event, Token)] == expected(prompt, count)
    return start


@pytest.mark.parametrize(
    ("bids", "index"),
    [
        ([Bid(0, 100, 0), Bid(0, 20, 0)], 1),  # the prefix is there
        ([Bid(0, 100, 0), Bid(130, 20, 0)], 0),  # computing it takes less than waiting
        ([Bid(0, 100, 0), Bid(110, 20, 0)], 1),
        ([Bid(0, 100, 3), Bid(0, 100, 2)], 1),  # else the one with fewer rows
        ([Bid(0, 100, 2), Bid(0, 100, 2)], 0),
    ],
)
def test_the_policy(bids: list[Bid], index: int) -> None:
    assert cheapest(bids) == index


def test_equal_replicas_take_turns() -> None:
    bids = [Bid(0, 9, 1)] * 3
    assert [cheapest(bids, turn) for turn in range(4)] == [0, 1, 2, 0]


def test_a_chat_goes_where_its_prefix_is() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        first, second = list(range(10, 90)), list(range(500, 580))
        await answered(engine, first)
        await answered(engine, second)
        assert placed(engine) == [1, 1]
        for turn in range(1, 4):
            for prompt in (first, second):
                start = await answered(engine, [*prompt, *range(turn)])
                assert start.cached == 80
        assert placed(engine) == [4, 4]
        loads = engine.replica_loads
        assert [(one.prompted, one.cached) for one in loads] == [(80 + 81 + 82 + 83, 240)] * 2

    serve(test)


def test_a_burst_of_one_prefix_is_divided() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        await asyncio.gather(*(answered(engine, [7] * 8 + [number] * 60) for number in range(40)))
        assert min(placed(engine)) >= 15

    serve(test)


def test_a_lost_replica_hands_its_streams_over_at_once() -> None:
    """The tokens are those of a run that nothing disturbs, greedy and drawn."""

    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        for executor in executors:
            executor.pace = 0.002
        executors[0].killed_starts = 10**9  # it does not come back
        kinds = [Sampling(), Sampling(do_sample=True, seed=5), Sampling(do_sample=True, seed=9, top_k=1)]

        async def one(number: int) -> None:
            prompt, sampling = [number, 3, number], kinds[number % len(kinds)]
            tokens, _ = await collect(engine.generate(GenerationRequest(prompt, sampling, 60)))
            assert tokens == expected(prompt, 60, sampling)

        async def kill() -> None:
            while min(lane.scheduler.running for lane in engine._lanes.all) < 8:
                await asyncio.sleep(0.002)
            executors[0].kill()
            assert engine.ready
            assert engine.replicas == [False, True]
            executors[0].on_lost()

        await asyncio.gather(kill(), *(one(number) for number in range(20)))
        assert taken(engine)[0] == 0
        assert taken(engine)[1] >= 8
        await answered(engine, [1, 2, 3])
        executors[0].killed_starts = 0
        while engine.replicas != [True, True]:
            await asyncio.sleep(0.002)

    serve(test)


def test_whichever_comes_back_first_takes_all() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        for executor in executors:
            executor.pace = 0.002
        tasks = [asyncio.ensure_future(answered(engine, [number], 60)) for number in range(12)]
        while min(lane.scheduler.running for lane in engine._lanes.all) < 4:
            await asyncio.sleep(0.002)
        executors[0].killed_starts = 10**9
        executors[1].killed_starts = 3
        for executor in executors:
            executor.kill()
        assert not engine.ready
        await asyncio.gather(*tasks)
        assert taken(engine)[1] >= 4

    serve(test)


def test_a_replica_that_comes_back_takes_its_share() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        executors[1].killed_starts = 10**9
        executors[1].kill()
        for executor in executors:
            executor.pace = 0.005
        tasks = [asyncio.ensure_future(answered(engine, [number] * 100, 40)) for number in range(24)]
        while engine.running < 2:
            await asyncio.sleep(0.001)
        assert engine.waiting > 12
        executors[1].killed_starts = 0
        while engine.replicas != [True, True]:
            await asyncio.sleep(0.001)
        assert taken(engine)[1] >= 6
        await asyncio.gather(*tasks)

    serve(test, max_batch_size=4)


def test_a_replica_that_cannot_load_fails_nobody() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        executors[0].failing_starts = 10**9
        executors[0].kill()
        for number in range(10):
            await answered(engine, [number])
        while engine._lanes.all[0].failing is None:
            await asyncio.sleep(0.002)
        for number in range(10):
            await answered(engine, [number])
        assert engine.ready
        executors[1].failing_starts = 10**9
        executors[1].kill()
        with pytest.raises(Unavailable, match="cannot be loaded now"):
            await answered(engine, [3], 200)

    serve(test)


def test_a_poisonous_request_fails_alone() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        for executor in executors:
            executor.poison = 666

        async def bad() -> None:
            with pytest.raises(WorkerLost, match="is not tried again"):
                await collect(engine.generate(GenerationRequest([666, 1], max_new_tokens=5)))

        await asyncio.gather(bad(), *(answered(engine, [number], 50) for number in range(6)))
        assert sum(executor.starts for executor in executors) <= 2 + 3

    serve(test)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("grace", [0.0, 60.0])
def test_a_rolling_restart_loses_nothing(count: int, grace: float) -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        for executor in executors:
            executor.pace = 0.001
        going = True

        async def caller(number: int) -> int:
            done = 0
            while going:
                await answered(engine, [number, done % 3], 20)
                done += 1
            return done

        callers = [asyncio.ensure_future(caller(number)) for number in range(6)]
        await asyncio.sleep(0.02)
        starts = [executor.starts for executor in executors]
        await engine.restart_replicas(grace)
        assert [executor.starts for executor in executors] == [number + 1 for number in starts]
        assert engine.ready
        going = False
        assert min(await asyncio.gather(*callers)) > 0

    serve(test, count)


def test_a_rolling_restart_ends_at_the_first_replica_that_cannot_load() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        executors[0].failing_starts = 2
        with pytest.raises(StartError, match="it does not start"):
            await engine.restart_replicas(0.0)
        assert (executors[0].starts, executors[1].starts) == (2, 1)
        await answered(engine, [3])
        while engine.replicas != [True, True]:
            await asyncio.sleep(0.002)

    serve(test)


def test_a_request_that_fits_one_replica_only_waits_for_it() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        for executor in executors:
            executor.pace = 0.002
        assert engine.info.limits.max_total_tokens == 1024
        long = asyncio.ensure_future(answered(engine, [5] * 240, 60))
        while not engine.running:
            await asyncio.sleep(0.001)
        (home,) = [number for number, lane in enumerate(engine._lanes.all) if lane.scheduler.running]
        executors[1 - home].room = 64
        executors[1 - home].kill()
        while engine.replicas != [True, True]:
            await asyncio.sleep(0.001)
        assert engine.info.limits.max_total_tokens == 256
        executors[home].kill()
        await long
        assert taken(engine) == [0, 0]

    serve(test)


def test_metrics_of_replicas() -> None:
    async def test(engine: Engine, executors: list[FakeExecutor]) -> None:
        await answered(engine, range(8))
        metrics = Metrics()
        metrics.generations.watch(lambda: engine.load, lambda: engine.replica_loads)
        text = metrics.render().decode()
        assert 'inflight_generator_replica_ready{model="fake",replica="1"} 1.0' in text
        assert 'inflight_generator_replica_requests_total{model="fake",replica="0"} 1.0' in text

    serve(test)


def test_processors_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of two cores of two threads, numbered as Intel's are: threads of a core four apart."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{number // 2 % 2}\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("inflight.place.cores.processors", lambda: 8)
    assert shares(2, tmp_path) == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert shares(4, tmp_path) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert shares(3, tmp_path) == [(0, 4), (1, 5), (2, 6)]
    assert shares(9, tmp_path) == []
    monkeypatch.setattr("inflight.place.cores.processors", lambda: 2)  # a quota
    assert shares(2, tmp_path) == []


def test_images_go_along() -> None:
    """A request whose images were not encoded, because their keys were cached, has them encoded where it goes on."""

    async def main() -> None:
        vision, executors = FakeVision(), [FakeExecutor(), FakeExecutor()]
        config = GeneratorConfig.of(Path("fake"), "fake", replicas=2)
        engine = Engine(config, word_tokenizer(), executors, QUICK, vision=vision)
        await engine.start()
        one = image(1, length=20)
        first = asked("w5 <image> w7 w8 w9 w10", one)
        vision.forgets = True
        await whole(engine, first)
        for executor in executors:
            executor.pace = 0.002
        cached = asyncio.ensure_future(whole(engine, replace(first, max_new_tokens=60)))
        fresh = asyncio.ensure_future(whole(engine, asked("w6 <image> w7", one, max_new_tokens=60)))
        while engine.running < 2:
            await asyncio.sleep(0.001)
        assert placed(engine) == [2, 1]
        assert len(vision.spared) == 1
        for executor in executors:
            executor.kill()
            while not all(engine.replicas):
                await asyncio.sleep(0.001)
        assert ids(await cached) == wanted(vision, [5, one, 7, 8, 9, 10], 60)
        assert ids(await fresh) == wanted(vision, [6, one, 7], 60)
        assert sum(taken(engine)) >= 2
        await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize(
    ("given", "replicas", "devices"),
    [
        ({}, 1, ((0,),)),
        ({"replicas": "3"}, 3, ((0,), (1,), (2,))),
        ({"device_ids": "2,5"}, 2, ((2,), (5,))),
        ({"device_ids": "4,5,6,7", "tensor_parallel": "2"}, 2, ((4, 5), (6, 7))),
        ({"replicas": "2", "tensor_parallel": "2"}, 2, ((0, 1), (2, 3))),
        ({"device_ids": "4,5", "tensor_parallel": "2"}, 1, ((4, 5),)),
    ],
)
def test_what_options_make_replicas(given: dict[str, Any], replicas: int, devices: tuple[tuple[int, ...], ...]) -> None:
    values = resolve(serve_command.COMMAND, {"paths": [str(POCKET)], "threads": "8", **given}, {})
    (config,) = serve_command.build_plan(values).generators
    assert config.replicas == replicas
    ones = [config.of_replica(number) for number in range(replicas)]
    jobs = [[shard_job(one, rank) for rank in range(one.tensor_parallel)] for one in ones]
    assert tuple(tuple(job.device_id for job in group) for group in jobs) == devices
    assert {job.model.threads for group in jobs for job in group} == {8 // replicas}
    cores = [set(group[0].processors) for group in jobs if group[0].processors]
    assert sum(map(len, cores)) == len(set().union(*cores))


def test_replicas_of_a_script() -> None:
    with LLM(POCKET, replicas=2) as llm, LLM(POCKET) as one:
        prompts = [f"One day, {name} went" for name in ("Mia", "Tim", "Sue", "Ben")]
        samplings = [Sampling(do_sample=True, seed=seed) for seed in range(4)]
        found = llm.generate(prompts, samplings, max_new_tokens=30, ignore_eos=True)
        assert [len(each.token_ids) for each in found] == [30] * 4
        assert found == one.generate(prompts, samplings, max_new_tokens=30, ignore_eos=True)
        assert placed(llm.engine) == [2, 2]
