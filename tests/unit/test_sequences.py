"""The states of sequences: how long they stay, and how many bytes they may fill."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

import numpy as np
import pytest

from inflight.config import DescribedConfig, SequenceConfig, StateConfig
from inflight.contract import MethodInfo, ServableStatus, TensorSpec
from inflight.errors import InvalidRequest, Overloaded, Unavailable
from inflight.frontends import Backend
from inflight.frontends.oip import sequences
from inflight.frontends.oip.sequences import Part, Sequences
from inflight.frontends.oip.tensors import OipTensor

X = OipTensor("x", "FP32", (1, 2), np.ones((1, 2), np.float32))


class Sums:
    """A `Backend` of models that add what came. `held`: requests that are not answered yet."""

    def __init__(self, **idle: float) -> None:
        self.described = {
            name: DescribedConfig(8, sequence=SequenceConfig((StateConfig("s", "s_out", "FP32", (2,)),), (), seconds))
            for name, seconds in idle.items()
        }
        self.held: list[tuple[float | None, Callable[[], None]]] | None = None

    def servables(self) -> list[ServableStatus]:
        return [ServableStatus(name, 1, (), True, 1, 1, described=says) for name, says in self.described.items()]

    def submit(
        self, method: MethodInfo, rows: Any, done: Callable[[Any], None], *, timeout: float | None = None
    ) -> Callable[[], None]:
        def answer() -> None:
            done([[row[0] + row[1], row[0] + row[1]] for row in rows])

        if self.held is None:
            answer()
        else:
            self.held.append((timeout, answer))
        return lambda: None


def method(name: str) -> MethodInfo:
    inputs, outputs = (TensorSpec("x"), TensorSpec("s")), (TensorSpec("y"), TensorSpec("s_out"))
    return MethodInfo(name, 1, "predict", inputs, outputs, stateful=True)


def run(test: Callable[[Sums, Sequences, Callable[[float], None]], Coroutine[Any, Any, None]]) -> None:
    """Runs a test with a clock that only the test moves on."""
    loop, ahead = asyncio.new_event_loop(), [0.0]
    loop.time = lambda: time.monotonic() + ahead[0]  # type: ignore[method-assign]

    def later(seconds: float) -> None:
        ahead[0] += seconds

    async def whole() -> None:
        sums = Sums(short=1.0, long=3600.0)
        await test(sums, Sequences(cast(Backend, sums)), later)

    try:
        loop.run_until_complete(asyncio.wait_for(whole(), 30000))
    finally:
        loop.close()


async def add(all: Sequences, name: str, id: int, **more: Any) -> float:
    timeout = more.pop("timeout", None)
    (y,) = await all.run(method(name), Part(id, **more), [X], timeout)
    return float(np.asarray(y.data)[0][0])


def test_the_idle_time_of_one_model_is_not_that_of_another() -> None:
    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        await add(all, "long", 1, start=True)
        await add(all, "short", 1, start=True)
        later(100)
        await add(all, "short", 2, start=True)
        assert await add(all, "long", 1) == 2
        with pytest.raises(InvalidRequest, match="has not begun"):
            await add(all, "short", 1)

    run(test)


def test_states_are_forgotten_though_nobody_asks_any_more() -> None:
    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        await add(all, "short", 1, start=True)
        later(100)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not all._models

    run(test)


def test_a_model_of_another_description_continues_no_sequence() -> None:
    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        await add(all, "long", 1, start=True)
        sums.described = Sums(long=3600.0).described  # loaded again
        assert await add(all, "long", 1) == 2
        sums.described = Sums(long=1800.0).described
        with pytest.raises(InvalidRequest, match="has not begun"):
            await add(all, "long", 1)
        sums.described = {}
        with pytest.raises(Unavailable, match="was unloaded"):
            await add(all, "long", 1, start=True)

    run(test)


def test_states_fill_so_many_bytes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_BYTES", 16)

    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        await add(all, "long", 1, start=True)
        await add(all, "long", 2, start=True)
        with pytest.raises(Overloaded, match="end some"):
            await add(all, "short", 3, start=True)
        assert await add(all, "long", 2, end=True) == 2
        assert await add(all, "short", 3, start=True) == 1

    run(test)


def test_the_bytes_that_are_held_are_those_of_the_states() -> None:
    """Whichever way sequences begin, go on and end, begin anew, are forgotten, or lose their model."""

    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        draw = random.Random(0)
        running: list[asyncio.Task[float]] = []
        most = 0
        for step in range(400):
            name, id = draw.choice(["short", "long"]), draw.randrange(1, 6)
            flags = {"start": draw.random() < 0.4, "end": draw.random() < 0.2}
            sums.held = [] if step % 40 == 20 else sums.held  # the next ones are not answered at once
            running.append(asyncio.ensure_future(add(all, name, id, **flags)))
            await asyncio.sleep(0)
            if step % 40 == 39:
                while sums.held:
                    sums.held.pop()[1]()
                    for _ in range(4):
                        await asyncio.sleep(0)
                sums.held = None
                await asyncio.gather(*running, return_exceptions=True)
            later(draw.choice([0.0, 0.1, 3.0]))
            if draw.random() < 0.05:
                idle = draw.choice([1800.0, 3600.0])
                sums.described = Sums(short=1.0, long=idle).described
            held = [one for own in all._models.values() for one in own.sequences.values()]
            assert all._bytes == sum(one.bytes for one in held), step
            most = max(most, all._bytes)
        assert most > 8
        later(10000)
        all._forget()
        assert all._bytes == 0

    run(test)


def test_a_request_waits_and_runs_within_one_time() -> None:
    async def test(sums: Sums, all: Sequences, later: Callable[[float], None]) -> None:
        sums.held = []
        first = asyncio.ensure_future(add(all, "short", 1, start=True))
        second = asyncio.ensure_future(add(all, "short", 1, timeout=20000.0))
        while not sums.held:
            await asyncio.sleep(0)
        later(100)  # it lasts longer than its sequence may be idle
        sums.held.pop()[1]()
        assert await first == 1
        while not sums.held:
            await asyncio.sleep(0)
        left, answer = sums.held.pop()
        answer()
        assert await second == 2
        assert left is not None
        assert left <= 19900

    run(test)


def test_an_id_has_so_many_characters_at_most() -> None:
    assert Part.of({"sequence_id": "x" * 1024, "sequence_start": True}).start
    with pytest.raises(InvalidRequest, match="more than 1024 characters"):
        Part.of({"sequence_id": "x" * 1025})
