"""Guessed tokens: with and without them every answer is the same, to the last bit."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest

from inflight.contract import GenerationRequest, Sampling, StepPlan, StepResult
from inflight.llm import LLM, Generation
from inflight.sched import Capacity, Scheduler, Sequence, guess
from inflight.sched.drafting import Drafting, _Step
from inflight.sched.speculation import AGE, HOPE, Experience, Speculation
from inflight.shard import ModelRunner
from inflight.text import json_grammar
from tests.fake_shards import FakeExecutor, FakeShards, expected
from tests.lm import POCKET, Driver, make_runner
from tests.unit.test_engine import collect, serve

MOST = 6


@pytest.fixture
def bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row guesses as much as it may, whatever it costs and brings."""
    monkeypatch.setattr(Speculation, "bar", lambda self, rows: 0.0 if self.most and rows < self.room else None)
    monkeypatch.setattr(Drafting, "begin", boldly)


def boldly(policy: Drafting, running: Items[Sequence], bar: float, plain: float | None) -> bool:
    """`Drafting.begin` of a draft model that costs nothing."""
    rates = {row.id: policy._rate(row) for row in running if policy._most and not row.spans}
    policy._step = _Step(rates, policy._most, bar, 0.0)
    return bool(rates)


@pytest.mark.parametrize(
    ("tokens", "most", "found"),
    [
        ([1, 2, 3, 9, 1, 2], 4, [3, 9]),  # two agree, so two are guessed
        ([5, 1, 2, 3, 7, 8, 5, 1, 2], 4, [3, 7, 8]),
        ([5, 1, 2, 3, 7, 8, 5, 1, 2], 2, [3, 7]),
        ([1, 2, 3, 0, 1, 2, 4, 0, 1, 2], 1, [4]),  # the last one of several
        ([6, 1, 2, 3, 0, 1, 2, 4, 6, 1, 2], 1, [3]),  # the longer one
        ([1, 2, 1, 2, 1, 2], 4, [1, 2, 1, 2]),  # goes on with itself
        ([4] * 9, 5, [4] * 5),
        ([1, 2, 3], 4, []),
        ([1, 1], 4, []),
        ([1, 1, 1], 4, [1, 1]),
        ([3], 4, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_a_guess_is_what_followed_the_longest_match(tokens: list[int], most: int, found: list[int]) -> None:
    assert guess(np.array(tokens, np.int32), most).tolist() == found


def test_a_row_guesses_as_long_as_it_pays() -> None:
    policy, row = Speculation(8), Experience()
    assert policy.bar(1) is None, "there is nothing to compare with yet"
    policy.took(1, 0, 1.0)
    bar = policy.bar(1)
    assert bar is not None
    assert policy.length(row, 10, bar) >= 2, "it hopes for the best"
    for _ in range(20):
        policy.tried(row, 3, 0)
    assert policy.length(row, 11, 0.3) == 0
    assert policy.length(Experience(), 11, 0.3) == 0, "a new row expects what others had"
    for _ in range(40):
        policy.tried(row, 4, 4)
    assert policy.length(row, 12, 0.3) == 8
    for _ in range(30):
        policy.tried(row, 3, 0)
    policy.took(1, 0, 1.0)
    assert policy.length(row, 12, 0.3) == 0
    for _ in range(1000):
        policy.took(1, 0, 1.0)
    assert policy.length(row, 1000, 0.3) > 0, "what was long ago is forgotten"
    assert abs(row.rate() - HOPE) < 0.1


def test_what_a_guess_costs_is_measured() -> None:
    policy = Speculation(8, room=16)
    for rows in (1, 8):
        policy.took(rows, 0, 1.0)
    for _ in range(30):
        policy.took(1, 4, 1.0)
        policy.took(8, 4, 1.8)
    cheap, dear = policy.bar(1), policy.bar(8)
    assert cheap is not None
    assert cheap < 0.1
    assert dear is not None
    assert dear > 1, "eight rows whose step takes 0.2 longer for each guess get nothing from any"
    assert policy.bar(16) is None, "there is no room"
    assert Speculation(0).bar(1) is None
    for _ in range(AGE):
        policy.took(1, 4, 1.0)
    assert policy.bar(1) is None, "now and then a step without guesses is measured"
    policy.took(1, 0, 1.0)
    assert policy.bar(1) == cheap


def test_grammars_prepare_no_more_than_a_step_has_room_for() -> None:
    scheduler, row = Scheduler(Capacity(100, 4, 64, 100, 100, 32, guesses=8)), Sequence(0, [1], Sampling(), 9)
    for rows, forced in ((1, 16), (20, 12), (32, 0), (60, 0)):
        scheduler._running = [row] * rows
        assert scheduler.hopes(row)[0] == forced


def requests(seed: int, count: int) -> list[Sequence]:
    """Rows whose texts repeat themselves, and others."""
    draw = random.Random(seed)
    rows = []
    for id in range(count):
        repeats = draw.choice((0, 2, 3, 5))
        sampling = Sampling(do_sample=draw.random() < 0.5, seed=id, top_k=repeats)
        prompt = [7] * 20 if draw.random() < 0.4 else [draw.randrange(9) for _ in range(draw.randrange(1, 30))]
        row = Sequence(id, prompt, sampling, draw.randrange(1, 60), priority=draw.randrange(2))
        row.lockstep = draw.random() < 0.2
        rows.append(row)
    return rows


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("blocks", [26, 64])
@pytest.mark.usefixtures("bold")
def test_plans_with_guesses_keep_the_contract(depth: int, blocks: int) -> None:
    """Random requests come, are given up, are preempted and computed again after losses: everybody gets the tokens that
    they get alone, the shards check every block that is read, and no block is lost."""
    total: Counter[str] = Counter()
    for seed in range(4):
        draw = random.Random(seed)
        capacity = Capacity(blocks, 4, 8, 40, 16, mixed_tokens=32, guesses=MOST, draft_length=60 * (seed % 2))
        scheduler, shards, plans = Scheduler(capacity), FakeShards(blocks, 4, 8, 40), deque[Any]()
        waiting = requests(seed, 30)
        asked, out = {row.id: row for row in waiting}, {row.id: [] for row in waiting}  # type: ignore[var-annotated]
        prompts = {row.id: list(row.tokens) for row in waiting}
        limits = {row.id: row.stop_at - row.num_prompt for row in waiting}
        given_up: set[int] = set()
        for _ in range(5000):
            if waiting and draw.random() < 0.1:
                row = waiting.pop()
                row.mask = b"m" if row.lockstep else None
                scheduler.add(row)
            if draw.random() < 0.01:
                id = draw.randrange(30)
                given_up.add(id)
                waiting = [row for row in waiting if row.id != id]
                scheduler.finish(id)
            if draw.random() < 0.01:
                total["right"], total["wrong"] = total["right"] + shards.right, total["wrong"] + shards.wrong
                assert not scheduler.lost()
                shards = FakeShards(blocks, 4, 8, 40)
                plans.clear()
            while len(plans) < depth and (plan := scheduler.plan()) is not None:
                plans.append(plan)
            if plans:
                result = shards.run(plans.popleft())
                for row, token, _ in scheduler.apply(result):
                    out[row.id].append(token)
                    row.mask = b"m" if row.lockstep else None
            elif not waiting:
                break
        assert not scheduler.requests
        scheduler.plan()
        assert scheduler.pool.free == blocks
        total["right"], total["wrong"] = total["right"] + shards.right, total["wrong"] + shards.wrong
        total["preempted"] += scheduler.preemptions
        for id, tokens in out.items():
            right = expected(prompts[id], limits[id], asked[id].sampling)
            assert tokens == right[: len(tokens)]
            assert len(tokens) == limits[id] or id in given_up
    assert total["right"] > 50
    assert total["wrong"] > 20
    assert blocks > 26 or total["preempted"]


@pytest.mark.usefixtures("bold")
def test_kills_and_stops_within_a_guess_change_no_token() -> None:
    async def test(engine: Any, executor: FakeExecutor) -> None:
        executor.pace = 0.001

        async def one(number: int) -> None:
            sampling = Sampling(do_sample=number % 3 == 0, seed=number, top_k=2 + number % 3)
            prompt, count = [number, 5], 60 + number
            right = expected(prompt, count, sampling)
            text = "".join(f" w{token}" for token in right)
            stop = text[len(text) // 2 :][:9] if number % 2 else ""
            request = GenerationRequest(prompt, sampling, count, stop=(stop,) if stop else ())
            tokens, finish = await collect(engine.generate(request))
            assert tokens == right[: len(tokens)]
            assert finish.reason.value == ("stop_sequence" if stop else "length")
            if stop:
                assert finish.text.rstrip().endswith(stop.rstrip())
                assert stop not in finish.text[:-1]

        async def killer() -> None:
            for _ in range(3):
                await asyncio.sleep(0.02)
                executor.kill()

        await asyncio.gather(killer(), *(one(number) for number in range(10)))
        assert executor.starts > 2

    serve(test, speculate=MOST)


def traffic() -> list[tuple[list[int], int, Sampling]]:
    """Prompts that repeat themselves and others, under everything that changes logits."""
    draw = random.Random(3)
    samplings = [
        Sampling(),
        Sampling(logprobs=True, top_n_tokens=3),
        Sampling(do_sample=True, seed=5, temperature=0.3, logprobs=True),
        Sampling(do_sample=True, seed=6, top_k=5, top_p=0.9, logprobs=True, top_n_tokens=2),
        Sampling(repetition_penalty=1.1, logprobs=True),
        Sampling(frequency_penalty=0.4, presence_penalty=0.3, logprobs=True),
        Sampling(do_sample=True, seed=7, logit_bias=((4, 6.0), (5, 5.0)), logprobs=True),
        Sampling(logit_bias=((4, 90.0), (5, 89.0)), frequency_penalty=0.3, top_n_tokens=2, logprobs=True),
        Sampling(do_sample=True, seed=8, min_p=0.1, typical_p=0.8, watermark=True, logprobs=True),
    ]
    asked = []
    for number, sampling in enumerate(samplings):
        part = [draw.randrange(3, 96) for _ in range(4 + number)]
        asked.append((part * 3 if number % 3 else part, 24 + 2 * number, sampling))
    return asked


def answers(runner: Any, crowd: bool, **limits: int) -> tuple[list[Any], int, int, int]:
    """What the rows of `traffic` get, all at once or one after the other; guessed tokens, right ones, preemptions."""
    driver, tops, drafted, told = Driver(runner, **limits), {}, 0, 0
    for prompt, count, sampling in traffic():
        driver.add(prompt, count, sampling)
        while not crowd and driver.step():
            pass
    driver.drain()
    for result in driver.results:
        for index, top in result.top.items():
            tops.setdefault(result.ids[index], []).append(top)
        drafted += sum(result.drafted.values())
        told += sum(result.ids.count(id) - 1 for id in result.drafted)
    for id in list(runner._batch.ids):
        runner._batch.filter(id)
    logprobs = [driver.logprobs[id] if sampling.logprobs else [] for id, (*_, sampling) in enumerate(traffic())]
    return [list(driver.out.values()), logprobs, tops], drafted, told, driver.scheduler.preemptions


@pytest.mark.usefixtures("bold")
def test_the_engine_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, log-probabilities and the most likely ones, greedy and drawn, alone, in a crowd, and preempted."""
    runner = make_runner(POCKET)
    assert runner.offer.model.drafts
    plain, none, _, _ = answers(runner, crowd=False)
    assert none == 0
    alone, drafted, right, _ = answers(runner, crowd=False, guesses=MOST)
    assert alone == plain
    assert 10 < right < drafted - 5
    crowd, drafted, right, _ = answers(runner, crowd=True, guesses=MOST, mixed_tokens=64)
    assert crowd == plain
    assert 10 < right < drafted - 5
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 2)
    *tight, preempted = answers(runner, crowd=True, guesses=MOST, mixed_tokens=64, num_blocks=36)
    assert tight[0] == plain
    assert preempted


SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 9},
        "favourite_colour": {"enum": ["red", "green"]},
        "children": {"type": "integer", "maximum": 9},
    },
    "required": ["first_name", "favourite_colour", "children"],
    "additionalProperties": False,
}


def written(guesses: int, lose: int | None, steps: Counter[str]) -> list[Generation]:
    """What a model writes under grammars and freely, all at once.

    Args:
        lose: the step at which the rank dies.
        steps: counts them, and the tokens that were guessed.
    """
    run, left = ModelRunner.run, [lose]

    def counted(runner: ModelRunner, plan: StepPlan) -> StepResult | None:
        if plan.step == left[0]:
            left[0] = None
            raise RuntimeError("the rank dies")
        result = run(runner, plan)
        assert result is not None
        steps["steps"] += 1
        steps["guessed"] += sum(result.drafted.values())
        return result

    samplings = [
        Sampling(do_sample=number % 2 == 1, seed=number, logprobs=True, top_n_tokens=2 * (number % 3))
        for number in range(6)
    ]
    grammars = [json_grammar(SCHEMA) if number % 3 else None for number in range(6)]
    with pytest.MonkeyPatch.context() as patch, LLM(POCKET, speculate=guesses, kv_cache_memory=8 << 20) as llm:
        patch.setattr(ModelRunner, "run", counted)
        return llm.generate(["Once upon a time"] * 6, samplings, max_new_tokens=50, grammar=grammars)


@pytest.mark.usefixtures("bold")
def test_a_grammar_skips_what_it_forces() -> None:
    """Schemas and free text in one batch, without a loss and with one: the same answers, in fewer steps."""
    many, few = Counter[str](), Counter[str]()
    plain = written(0, None, many)
    assert written(MOST, None, few) == plain
    assert many["guessed"] == 0
    assert few["steps"] < 0.8 * many["steps"]
    assert written(MOST, 12, few) == plain
