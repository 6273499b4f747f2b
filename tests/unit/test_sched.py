"""The scheduler against shards that check every plan: random traffic, two plans in flight, losses."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import EncodedImage, Grid, Sampling, Span, StepPlan
from inflight.errors import InvalidRequest
from inflight.sched import BlockPool, Capacity, Scheduler, Sequence
from inflight.sched.prompts import BEGUN, BURST, SHARE
from tests.fake_shards import FakeShards, ShardsDied, expected

PREFIX = [7] * 40


PAD = 3
"""The token in the places of images."""


def picture(number: int, count: int) -> EncodedImage:
    """An image of `count` tokens. Those with different numbers have different rows."""
    rows = np.arange(count, dtype=np.float32)[:, None] + 100 * number
    return EncodedImage(blake2b(rows.tobytes(), digest_size=16).digest(), Grid(1, count), rows)


def pictured(parts: Items[list[int] | EncodedImage], whole: bool = False) -> dict[str, Any]:
    """The prompt, spans and images of a sequence whose prompt has these parts. An image of several tokens has two
    spans without anything between them."""
    prompt: list[int] = []
    spans: list[Span] = []
    images: list[EncodedImage] = []
    for part in parts:
        if isinstance(part, list):
            prompt += part
            continue
        count = len(part.rows)
        for first, stop in ((0, count // 2), (count // 2, count)):
            if first < stop:
                spans.append(Span(len(prompt), stop - first, len(images), first, part.digest, part.grid, whole))
            prompt += [PAD] * (stop - first)
        images.append(part)
    return {"prompt": prompt, "spans": tuple(spans), "images": tuple(images)}


def capacity(num_blocks: int = 64, block_size: int = 4, rows: int = 8, step: int = 24, prefill: int = 16) -> Capacity:
    return Capacity(num_blocks, block_size, rows, step, prefill)


@dataclass
class Bench:
    """A scheduler and its shards; plans wait in flight until they are answered."""

    capacity: Capacity
    depth: int = 2
    scheduler: Scheduler = field(init=False)
    shards: FakeShards = field(init=False)
    plans: deque[StepPlan] = field(default_factory=deque)
    out: dict[int, list[int]] = field(default_factory=dict)
    asked: dict[int, Sequence] = field(default_factory=dict)
    rows: dict[int, dict[int, bytes]] = field(default_factory=dict)
    late: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.capacity)
        self.restart()

    def restart(self) -> None:
        c = self.capacity
        self.shards = FakeShards(c.num_blocks, c.block_size, c.max_rows, c.max_step_tokens)
        self.plans.clear()

    def add(self, sequence: Sequence) -> None:
        self.asked[sequence.id] = sequence
        self.rows[sequence.id] = {
            span.start + index: sequence.images[span.image].rows[span.offset + index].tobytes()
            for span in sequence.spans
            for index in range(span.count)
        }
        self.out[sequence.id] = []
        if sequence.lockstep:
            sequence.mask = str(len(sequence.tokens)).encode()
        self.scheduler.add(sequence)

    def submit(self) -> bool:
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
        return plan is not None

    def answer(self) -> None:
        plan = self.plans.popleft()
        masks, before = dict(plan.masks), {id: len(row.tokens) for id, row in self.shards.rows.items()}
        before |= {each.id: len(each.token_ids) for each in plan.prefill if each.token_ids is not None}
        result = self.shards.run(plan)
        for id in result.ids:  # a mask is sent with the very step that samples, and is that of the last known token
            assert (id in masks) == self.asked[id].lockstep
            assert int(masks.get(id, before[id])) == before[id]
        for sequence, token, _ in self.scheduler.apply(result):
            self.out[sequence.id].append(token)
            if sequence.lockstep:
                self.late.append(sequence)

    def masks(self) -> None:
        """What the host computes between two steps."""
        for sequence in self.late:
            sequence.mask = str(len(sequence.tokens)).encode()
        self.late.clear()

    def step(self) -> bool:
        self.masks()
        while len(self.plans) < self.depth and self.submit():
            pass
        if not self.plans:
            return False
        self.answer()
        return True

    def drain(self) -> None:
        for _ in range(100_000):
            if not self.step():
                break
        assert not self.scheduler.requests, "requests are left that nobody computes"

    def check(self, cancelled: dict[int, int]) -> None:
        for id, sequence in self.asked.items():
            prompt = sequence.tokens[: sequence.num_prompt]
            want = expected(prompt, sequence.stop_at - sequence.num_prompt, sequence.sampling, self.rows[id])
            if id in cancelled:
                assert self.out[id] == want[: len(self.out[id])]
            else:
                assert self.out[id] == want
        self.scheduler.plan()  # the last rows leave
        assert self.scheduler.pool.free == self.capacity.num_blocks
        assert self.scheduler.running == self.scheduler.waiting == 0


requests = st.tuples(
    st.integers(0, 40),  # of the common prefix
    st.lists(st.integers(0, 996), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(["", "", "b"]),
    st.booleans(),
    st.sampled_from([None, 1, 2**63]),
    st.sampled_from([None, None, (0, 1), (0, 5), (1, 5), (2, 8)]),  # an image behind the common prefix: number, tokens
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), requests),
        st.tuples(st.just("submit"), st.none()),
        st.tuples(st.just("answer"), st.none()),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("finish"), st.integers(0, 30)),
        st.tuples(st.just("lose"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    events,
    st.sampled_from(
        [(20, 4, 3, 9, 9), (64, 4, 8, 24, 16), (30, 8, 4, 200, 200), (40, 2, 16, 17, 1)]
        + [(20, 4, 3, 9, 9, 2), (64, 4, 8, 24, 16, 5), (40, 2, 16, 17, 17, 17)]
    ),
    st.integers(1, 3),
)
def test_random_traffic(happenings: list[tuple[str, object]], size: tuple[int, ...], depth: int) -> None:
    """Everybody gets exactly the tokens that it gets alone, blocks come back, nothing waits for ever."""
    bench = Bench(Capacity(*size), depth)
    cancelled: dict[int, int] = {}
    room = bench.capacity.total_tokens
    for what, detail in happenings:
        if what == "add":
            arrival: Any = detail
            common, own, new, priority, tenant, lockstep, seed, image = arrival
            seen = [] if image is None else [picture(*image)]
            given = pictured([PREFIX[:common], *seen, own], whole=bench.capacity.max_prefill_tokens >= 4)
            if len(given["prompt"]) + new - 1 > room:
                continue
            sampling = Sampling() if seed is None else Sampling(do_sample=True, seed=seed)
            given.update(priority=priority, tenant=tenant, lockstep=lockstep)
            bench.add(Sequence(len(bench.asked), sampling=sampling, max_new_tokens=new, **given))
        elif what == "submit" and len(bench.plans) < depth:
            bench.submit()
        elif what == "answer" and bench.plans:
            bench.answer()
        elif what == "step":
            for _ in range(detail):  # type: ignore[call-overload]
                bench.step()
        elif what == "finish" and detail in bench.scheduler.requests:
            cancelled[detail] = len(bench.out[detail])  # type: ignore[index]
            bench.scheduler.finish(detail)  # type: ignore[arg-type]
        elif what == "lose":
            for sequence in bench.scheduler.lost():
                cancelled[sequence.id] = len(bench.out[sequence.id])
            bench.restart()
    bench.drain()
    bench.check(cancelled)


@pytest.mark.parametrize("whole", [False, True])
def test_equal_images_share_blocks_and_others_never(whole: bool) -> None:
    """The third prompt has the same tokens as the first, and another image from its tenth token on."""
    bench = Bench(capacity(num_blocks=200, step=400, prefill=400))
    cached = []
    for id, number in enumerate((1, 1, 2)):
        given = pictured([[7] * 10, picture(number, 12), [8] * 10], whole)
        bench.add(Sequence(id, sampling=Sampling(), max_new_tokens=3, **given))
        bench.drain()
        cached.append(bench.asked[id].cached)
    assert cached == [0, 28, 8]
    bench.check({})


def test_a_hit_may_end_in_an_image_that_is_then_computed_to_its_end() -> None:
    """The cache has lost the last blocks of the image."""
    bench = Bench(capacity(num_blocks=12, rows=2, step=40, prefill=8), depth=1)
    given = pictured([[7] * 6, picture(1, 16), [8] * 4], whole=True)  # spans 6 to 14 and 14 to 22
    bench.add(Sequence(0, sampling=Sampling(), max_new_tokens=1, **given))
    bench.drain()
    bench.add(Sequence(1, [9] * 30, Sampling(), 1))  # takes free blocks, and then those that were used least recently
    bench.drain()
    bench.add(Sequence(2, sampling=Sampling(), max_new_tokens=3, **given))
    bench.drain()
    assert bench.asked[2].cached == 16, "in the second span"
    bench.check({})


def test_an_image_that_must_be_whole_may_exceed_the_share_of_prompts() -> None:
    bench = Bench(Capacity(2000, 4, 8, 256 + 8, 256, mixed_tokens=32), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 60))
    for _ in range(BEGUN + 1):
        bench.step()
    given = pictured([[7] * 20, picture(1, 128), [8] * 1000], whole=True)  # two spans of 64
    bench.add(Sequence(1, sampling=Sampling(), max_new_tokens=3, **given))
    assert [tokens_of(bench)[0] for _ in range(4)] == [20, 64, 64, 31]
    bench.drain()
    bench.check({})


def test_a_shared_prefix_is_computed_once() -> None:
    bench = Bench(capacity(num_blocks=200, step=400, prefill=400))
    bench.add(Sequence(0, [*PREFIX, 1], Sampling(), 3))
    bench.drain()
    before = bench.shards.computed_tokens
    bench.add(Sequence(1, [*PREFIX, 2, 3], Sampling(), 3))
    bench.drain()
    assert bench.asked[1].cached == 40
    assert bench.shards.computed_tokens - before == 2 + 2
    bench.check({})


def test_tenants_share_nothing() -> None:
    bench = Bench(capacity(num_blocks=200))
    bench.add(Sequence(0, PREFIX, Sampling(), 3, tenant="a"))
    bench.drain()
    bench.add(Sequence(1, PREFIX, Sampling(), 3, tenant="b"))
    bench.drain()
    assert bench.asked[1].cached == 0


def test_a_long_prompt_delays_the_others_by_one_chunk() -> None:
    bench = Bench(capacity(num_blocks=300, step=20, prefill=16), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 60))
    bench.step()
    bench.add(Sequence(1, list(range(400)), Sampling(), 2))
    for _ in range(25):
        before = len(bench.out[0])
        bench.step()
        assert len(bench.out[0]) == before + 1
    assert bench.out[1]
    bench.drain()
    bench.check({})


def steady(rows: int = 40) -> Capacity:
    """As on a CPU."""
    return Capacity(2000, 4, rows, 256 + rows, 256, mixed_tokens=32)


def tokens_of(bench: Bench) -> tuple[int, int]:
    """Runs a step. Returns how many tokens of prompts it computes, and how many rows decode in it."""
    bench.submit()
    plan = bench.plans[-1]
    chunks = [each.chunk for each in plan.prefill]
    decoding = len(bench.shards.rows) - len(plan.filter) - len(plan.hold)
    decoding -= sum(each.token_ids is None for each in plan.prefill)  # they are rows already
    bench.answer()
    return sum(chunks), decoding


def test_prompts_fill_up_the_steps_of_those_that_stream() -> None:
    bench = Bench(steady(), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 60))
    for _ in range(BEGUN + 1):
        bench.step()
    bench.add(Sequence(1, list(range(400)), Sampling(), 40))
    for _ in range(400 // 31):
        before = len(bench.out[0])
        assert tokens_of(bench) == (31, 1)
        assert len(bench.out[0]) == before + 1
    assert not bench.out[1]
    assert tokens_of(bench) == (400 % 31, 1)
    assert tokens_of(bench) == (0, 2)
    bench.drain()
    bench.check({})


def test_the_more_wait_the_more_give_way() -> None:
    bench = Bench(steady(rows=12), depth=1)
    for id in range(4):
        bench.add(Sequence(id, [id, 1, 2], Sampling(), 60))
    for _ in range(BEGUN + 1):
        bench.step()
    for id in range(4, 100):
        bench.add(Sequence(id, [id] * 200, Sampling(), 2))
    assert tokens_of(bench) == (4 + SHARE * 8, 4), "for as many as there are rows for"
    for id in range(5, 100):
        bench.scheduler.finish(id)
    assert tokens_of(bench) == (32 - 4, 4)


def test_those_that_come_together_stream_together() -> None:
    bench = Bench(steady(), depth=1)
    for id in range(8):
        bench.add(Sequence(id, [id] * 128, Sampling(), 10))
    assert [tokens_of(bench) for _ in range(4)] == [(256, 0)] * 4
    assert [len(bench.out[id]) for id in range(8)] == [1] * 8
    assert [tokens_of(bench) for _ in range(BEGUN)] == [(0, 8)] * BEGUN
    bench.add(Sequence(8, [8] * 128, Sampling(), 10))
    assert tokens_of(bench) == (24, 8), "now they stream"
    bench.drain()
    bench.check({})


def test_one_of_a_burst_may_come_a_little_before_the_others() -> None:
    """Two plans are made for it at once, before anybody else is there."""
    bench = Bench(steady(), depth=2)
    bench.add(Sequence(0, [1] * 128, Sampling(), 10))
    assert bench.submit()
    assert bench.submit()
    for id in range(1, 4):
        bench.add(Sequence(id, [id] * 128, Sampling(), 10))
    bench.answer()
    assert bench.submit()
    assert bench.plans[-1].hold == [0]
    assert sum(each.chunk for each in bench.plans[-1].prefill) == 256
    bench.drain()
    bench.check({})


@pytest.mark.parametrize("length", [BURST, BURST + 1])
def test_nobody_waits_for_more_than_a_burst(length: int) -> None:
    bench = Bench(steady(), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 200))
    bench.step()
    bench.add(Sequence(1, list(range(length)), Sampling(), 10))
    assert tokens_of(bench) == ((256, 0) if length == BURST else (31, 1))
    bench.drain()
    bench.check({})


def test_those_that_come_meanwhile_do_not_prolong_a_burst() -> None:
    bench = Bench(steady(), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 200))
    bench.step()
    held = 0
    for id in range(1, 100):
        bench.add(Sequence(id, [id % 50] * 250, Sampling(), 10))
        prompt, decoding = tokens_of(bench)
        if decoding:
            break
        held += prompt
    assert 750 <= held <= BURST
    bench.drain()
    bench.check({})


def test_a_burst_that_does_not_fit_keeps_nobody_waiting() -> None:
    bench = Bench(Capacity(30, 4, 8, 64, 32, mixed_tokens=32), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 20))
    bench.step()
    bench.add(Sequence(1, [4] * 110, Sampling(), 3))
    assert tokens_of(bench) == (0, 1), "no room for the second, and the first goes on"
    bench.drain()
    bench.check({})


def test_the_estimate_is_beaten_and_a_row_is_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 64)
    bench = Bench(capacity(num_blocks=50, rows=4, step=64, prefill=64))
    for id in range(4):
        bench.add(Sequence(id, [id] * 10, Sampling(), 150))
    bench.drain()
    assert bench.scheduler.preemptions
    bench.check({})


def test_poison_runs_alone_the_third_time_and_is_then_given_up() -> None:
    bench = Bench(capacity(num_blocks=200))
    for id in range(3):
        bench.add(Sequence(id, [id, 5], Sampling(), 30))
    given_up: list[int] = []
    for _ in range(20):
        while len(bench.plans) < 2 and bench.submit():
            pass
        if not bench.plans:
            break
        # Request 1 kills the shards whenever it is computed.
        if 1 in bench.shards.rows or any(admission.id == 1 for plan in bench.plans for admission in plan.prefill):
            alone = bench.scheduler.running == 1
            guilty = [sequence.id for sequence in bench.scheduler.lost()]
            assert not guilty or alone
            given_up += guilty
            bench.restart()
        else:
            for _ in range(40):
                bench.step()
    bench.drain()
    assert given_up == [1]
    bench.check({1: 0})


poisons = st.lists(
    st.tuples(
        st.integers(1, 12),  # tokens of the prompt
        st.integers(1, 12),  # and of the answer
        st.sampled_from(["none", "none", "prompt", "middle", "last"]),
        st.booleans(),  # follows a grammar
        st.integers(0, 8),  # steps before the next one comes
        st.one_of(st.none(), st.none(), st.integers(0, 12)),  # steps after which its caller leaves
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(poisons, st.sampled_from([(64, 4, 8, 24, 16), (30, 4, 3, 9, 9), (64, 4, 8, 24, 16, 6)]), st.integers(1, 3))
def test_the_guilty_are_found_and_nobody_else(
    asked: list[tuple[int, int, str, bool, int, int | None]], size: tuple[int, ...], depth: int
) -> None:
    """Rows that kill the shards at their prompt, in the middle or at their last token, with others coming and going."""
    bench = Bench(Capacity(*size), depth)
    poison: dict[int, int] = {}
    guilty: list[int] = []
    cancelled: dict[int, int] = {}
    leaves: dict[int, int] = {}
    losses = now = 0

    def step() -> bool:
        nonlocal losses, now
        now += 1
        for id in [id for id, when in leaves.items() if when <= now and id in bench.scheduler.requests]:
            cancelled[id] = len(bench.out[id])
            bench.scheduler.finish(id)
        try:
            return bench.step()
        except ShardsDied:
            losses += 1
            guilty.extend(sequence.id for sequence in bench.scheduler.lost())
            bench.restart()
            bench.shards.poison = poison
            return True

    bench.shards.poison = poison
    for id, (prompt, new, where, lockstep, pause, leave) in enumerate(asked):
        points = {"prompt": prompt // 2, "middle": prompt - 1 + new // 2, "last": prompt + new - 2}
        if where in points:
            poison[id] = points[where]
        bench.add(Sequence(id, [id] * prompt, Sampling(), new, lockstep=lockstep))
        if leave is not None:
            leaves[id] = now + leave
        for _ in range(pause):
            step()
    for _ in range(2000):
        if not step():
            break
    assert not bench.scheduler.requests
    assert losses <= 3 * len(poison)
    assert sorted(guilty) == sorted(id for id in poison if id not in cancelled or id in guilty)
    bench.check({**dict.fromkeys(guilty, 0), **cancelled})


@pytest.mark.parametrize(("killed", "most"), [(False, 3), (True, 6)])
def test_a_kill_from_outside_says_less_than_a_crash(killed: bool, most: int) -> None:
    """Also the system kills, where a request uses up the memory: in the end it is that one."""
    bench = Bench(capacity())
    for id in range(3):
        bench.add(Sequence(id, [id, 5], Sampling(), 30))
    given_up: list[int] = []
    losses = 0
    for _ in range(200):
        bench.submit()
        if any(row.id == 1 for sent in bench.scheduler._in_flight for row in sent.rows):
            losses += 1
            given_up += [sequence.id for sequence in bench.scheduler.lost(killed)]
            bench.restart()
        elif not bench.step():
            break
    assert given_up == [1]
    assert losses == most
    bench.check({1: 0})


def test_a_loss_while_nothing_is_computed_is_nobodys_fault() -> None:
    bench = Bench(capacity(), depth=1)
    bench.add(Sequence(0, [1, 2, 3], Sampling(), 9, lockstep=True))
    bench.step()
    for _ in range(5):
        assert not bench.plans
        assert not bench.scheduler.lost()
        bench.restart()
    assert not bench.asked[0].blame
    bench.drain()
    bench.check({})


def test_a_loss_takes_no_memory() -> None:
    scheduler = Scheduler(capacity(num_blocks=20_000))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            assert not scheduler.lost()
        assert tracemalloc.get_traced_memory()[1] < 100_000, "the pool of blocks takes 2 MB"
    finally:
        tracemalloc.stop()
        gc.enable()


def test_fewer_blocks_after_a_restart() -> None:
    """Who no longer fits is told, everybody else goes on; more blocks are as well."""
    bench = Bench(capacity(num_blocks=64))
    for id, new in enumerate([200, 20, 30, 41]):
        bench.add(Sequence(id, [id] * 10, Sampling(), new))
    for _ in range(4):
        bench.step()
    assert not bench.scheduler.lost()
    bench.capacity = capacity(num_blocks=12)
    assert [sequence.id for sequence in bench.scheduler.resize(bench.capacity)] == [0, 3]
    bench.restart()
    with pytest.raises(InvalidRequest, match="do not fit the cache of 48 tokens"):
        bench.scheduler.check(10, 40)
    for _ in range(9):
        bench.step()
    assert not bench.scheduler.lost()
    bench.capacity = capacity(num_blocks=64)
    assert not bench.scheduler.resize(bench.capacity)
    bench.restart()
    bench.scheduler.check(10, 200)
    bench.drain()
    bench.check({0: 0, 3: 0})


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(capacity(num_blocks=4, block_size=4))
    scheduler.check(10, 7)
    with pytest.raises(InvalidRequest, match="do not fit the cache of 16 tokens"):
        scheduler.check(10, 8)


def test_higher_priority_goes_first() -> None:
    bench = Bench(capacity(rows=1))
    for id in range(4):
        bench.add(Sequence(id, [id], Sampling(), 2, priority=id % 2))
    order: list[int] = []
    while bench.step():
        order += [id for id, tokens in bench.out.items() if tokens and id not in order]
    assert order == [1, 3, 0, 2]


def test_cancelled_requests_do_not_pile_up() -> None:
    bench = Bench(capacity(rows=1))
    bench.add(Sequence(0, [1], Sampling(), 200))
    bench.step()
    for id in range(1, 10_001):
        bench.scheduler.add(Sequence(id, [1], Sampling(), 2))
        bench.scheduler.finish(id)
    assert bench.scheduler.waiting == 0
    assert bench.scheduler._queues.held < 3000


def test_waiting_requests_do_not_slow_a_step() -> None:
    """Not a stopwatch: the work of a step is counted by who is looked at."""
    bench = Bench(capacity(num_blocks=2000, rows=8))
    for id in range(8):
        bench.add(Sequence(id, [id], Sampling(), 900))
    for _ in range(10):
        bench.step()

    def cost() -> float:
        times = []
        for _ in range(30):
            begin = time.thread_time()
            bench.submit()
            times.append(time.thread_time() - begin)
            bench.answer()
        return sorted(times)[10]

    before = cost()
    for id in range(8, 10_008):
        bench.scheduler.add(Sequence(id, [1, 2, 3], Sampling(), 20))
    assert cost() < 5 * before + 100e-6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "publish", "share"]), st.integers(0, 9)), max_size=80))
def test_block_pool(steps: list[tuple[str, int]]) -> None:
    """Free and used blocks are always all blocks, and a published block holds its content until it is taken."""
    pool = BlockPool(10)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for what, number in steps:
        if what == "take":
            taken = pool.take(number)
            assert (taken is None) == (number > 10 - len({block for blocks in held for block in blocks}))
            if taken:
                held.append(taken)
                for block in taken:
                    content.pop(block, None)
        elif what == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif what == "publish" and held:
            block = held[number % len(held)][0]
            digest = bytes([block]) * 16
            pool.publish(block, digest)
            content[block] = digest
        elif what == "share":
            found = pool.find([bytes([number]) * 16])
            assert found == ([number] if number in content else [])
            pool.share(found)
            if found:
                held.append(found)
        assert pool.free == 10 - len({block for blocks in held for block in blocks})
