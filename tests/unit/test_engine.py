"""The engine over shards without a model: streams, limits, losses. The tokenizer is a real one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tokenizers

from inflight.config import GeneratorConfig, RestartPolicy
from inflight.contract import Chat, Finish, FinishReason, GenerationRequest, Sampling, Start, Token
from inflight.engine import Engine
from inflight.engine import streams as streams_module
from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    StartError,
    TemplateError,
    Unavailable,
    WorkerLost,
)
from inflight.text import Tokenizer
from tests.fake_shards import FakeExecutor, expected

T = TypeVar("T")
QUICK = RestartPolicy(first_delay=0.01, max_delay=0.02)


def word_tokenizer(eos: tuple[int, ...] = ()) -> Tokenizer:
    """Token n is the word `wn`."""
    vocabulary = {f"w{number}": number for number in range(997)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(inner, eos, {}, None)


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def serve(test: Callable[[Engine, FakeExecutor], Awaitable[T]], eos: tuple[int, ...] = (), **limits: Any) -> T:
    """Runs a test against a started engine, and looks that nothing of it is left."""

    async def main() -> T:
        executor = FakeExecutor()
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake", **limits), word_tokenizer(eos), executor, QUICK)
        await engine.start()
        try:
            result = await asyncio.wait_for(test(engine, executor), 60)
            for _ in range(500):
                scheduler = engine._lanes.all[0].scheduler
                if not engine.streams and not scheduler.in_flight and not scheduler.requests:
                    break
                await asyncio.sleep(0.01)
            assert not engine.streams
            assert not scheduler.requests
            scheduler.plan()
            assert scheduler.pool.free == scheduler.pool.count, "blocks are lost"
        finally:
            await engine.stop()
        return result

    return asyncio.run(main())


async def collect(events: AsyncIterator[Any]) -> tuple[list[int], Finish]:
    """Tokens and the last event; checks the order of events."""
    tokens: list[int] = []
    deltas = ""
    first = await anext(events)
    assert isinstance(first, Start)
    async for event in events:
        if isinstance(event, Finish):
            assert deltas + event.delta == event.text
            assert event.generated == len(tokens)
            return tokens, event
        assert isinstance(event, Token)
        tokens.append(event.info.id)
        deltas += event.delta
    raise AssertionError("no last event")


def test_everybody_gets_their_own_tokens() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        draw = random.Random(1)

        async def one(number: int) -> None:
            await asyncio.sleep(draw.random() / 50)
            prompt = [draw.randrange(997) for _ in range(draw.randrange(1, 60))]
            count = draw.randrange(1, 40)
            sampling = Sampling(do_sample=True, seed=number) if number % 2 else Sampling()
            tokens, finish = await collect(engine.generate(GenerationRequest(prompt, sampling, count)))
            assert tokens == expected(prompt, count, sampling)
            assert finish.reason is FinishReason.LENGTH
            assert finish.prompt_length == len(prompt)

        await asyncio.gather(*(one(number) for number in range(60)))
        assert executor.most_in_flight == 2

    serve(test)


@pytest.mark.parametrize("depth", [1, 2])
def test_kills_in_mid_stream_change_no_token(depth: int) -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.001

        async def one(number: int) -> None:
            tokens, _ = await collect(engine.generate(GenerationRequest([number, 5], max_new_tokens=80)))
            assert tokens == expected([number, 5], 80)

        async def killer() -> None:
            for _ in range(5):
                await asyncio.sleep(0.04)
                executor.kill()

        await asyncio.gather(killer(), *(one(number) for number in range(12)))
        assert executor.starts > 2

    serve(test, plans_in_flight=depth)


def test_a_poisonous_request_fails_alone() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.poison = 666

        async def good(number: int) -> None:
            tokens, _ = await collect(engine.generate(GenerationRequest([number], max_new_tokens=50)))
            assert tokens == expected([number], 50)

        async def bad() -> None:
            with pytest.raises(WorkerLost, match="is not tried again"):
                await collect(engine.generate(GenerationRequest([666, 1], max_new_tokens=5)))

        await asyncio.gather(bad(), *(good(number) for number in range(6)))

    serve(test)


def test_a_hung_step_is_a_loss() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        events = engine.generate(GenerationRequest([3], max_new_tokens=30))
        await anext(events)
        executor.stuck = True
        tokens = [event.info.id async for event in events if isinstance(event, Token)]
        assert tokens == expected([3], 30)
        assert executor.starts == 2

    serve(test, step_timeout=0.2)


def test_shards_that_do_not_come_back() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.005
        events = engine.generate(GenerationRequest([3], max_new_tokens=300))
        await anext(events)
        executor.failing_starts = 5
        executor.kill()
        with pytest.raises(Unavailable, match="cannot be loaded now"):
            async for _ in events:
                pass
        assert not engine.ready
        while not engine.ready:
            with pytest.raises(Unavailable):
                await anext(engine.generate(GenerationRequest([3])))
            await asyncio.sleep(0.005)
        tokens, _ = await collect(engine.generate(GenerationRequest([3], max_new_tokens=3)))
        assert tokens == expected([3], 3)

    serve(test)


def test_an_idle_model_starts_anew_at_once() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        for number in range(1, 4):
            assert engine.ready
            executor.kill()
            assert not engine.ready
            while not engine.ready:
                await asyncio.sleep(0.001)
            assert executor.starts == 1 + number
        tokens, _ = await collect(engine.generate(GenerationRequest([3], max_new_tokens=3)))
        assert tokens == expected([3], 3)

    serve(test)


def test_kills_while_it_loads_fail_nobody() -> None:
    """They say nothing about the model: who waits goes on waiting, to its own deadline."""

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.005
        executor.killed_starts = 20
        began = engine.generate(GenerationRequest([3], max_new_tokens=60))
        await anext(began)
        executor.kill()
        came = asyncio.ensure_future(collect(engine.generate(GenerationRequest([4], max_new_tokens=9))))
        with pytest.raises(DeadlineExceeded):
            await collect(engine.generate(GenerationRequest([5], max_new_tokens=60, timeout=0.05)))
        assert not engine.ready
        assert [event.info.id async for event in began if isinstance(event, Token)] == expected([3], 60)
        assert (await came)[0] == expected([4], 9)
        assert executor.starts == 22

    serve(test)


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_kills_at_the_first_start(kills: int) -> None:
    """Somebody else's kill does not end it; the third one does, since nothing has ever been ready here."""

    async def main() -> None:
        executor = FakeExecutor()
        executor.killed_starts = kills
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake"), word_tokenizer(), executor, QUICK)
        if kills == 3:
            with pytest.raises(StartError, match="it was killed while it loaded; so ended all of 3 starts"):
                await engine.start()
        else:
            await engine.start()
            tokens, _ = await collect(engine.generate(GenerationRequest([3], max_new_tokens=9)))
            assert tokens == expected([3], 9)
        assert executor.starts == min(kills + 1, 3)
        await engine.stop()

    asyncio.run(main())


def test_shards_that_stay_away_fail_those_without_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.engine.recovery.PATIENCE", 0.2)

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.killed_starts = 10**9
        executor.kill()
        patient = asyncio.ensure_future(collect(engine.generate(GenerationRequest([4], max_new_tokens=9, timeout=60))))
        with pytest.raises(Unavailable, match=r"has not come back within 0\.2 seconds"):
            await collect(engine.generate(GenerationRequest([3], max_new_tokens=9)))
        with pytest.raises(Unavailable, match="cannot be loaded now"):
            await anext(engine.generate(GenerationRequest([3])))
        executor.killed_starts = 0
        assert (await patient)[0] == expected([4], 9)
        assert (await collect(engine.generate(GenerationRequest([3], max_new_tokens=9))))[0] == expected([3], 9)

    serve(test)


@pytest.mark.parametrize("flag", [None, 500])
def test_less_memory_after_a_restart(flag: int | None) -> None:
    """The model comes back with fewer blocks: limits follow, what no longer fits is told so, the rest goes on."""

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.001
        assert engine.info.limits.max_total_tokens == (flag or 1024)
        long = engine.generate(GenerationRequest([3], max_new_tokens=450))
        short = engine.generate(GenerationRequest([4], max_new_tokens=150))
        await anext(long)
        await anext(short)
        executor.room = 50
        executor.kill()
        with pytest.raises(Unavailable, match="its cache holds 200 tokens now, and this request may need 450"):
            async for _ in long:
                pass
        assert [event.info.id async for event in short if isinstance(event, Token)] == expected([4], 150)
        assert (engine.info.limits.max_total_tokens, engine.info.limits.max_input_tokens) == (200, 199)
        with pytest.raises(InvalidRequest, match="must be <= 200"):
            await anext(engine.generate(GenerationRequest([3], max_new_tokens=450)))
        executor.room = 10_000
        executor.kill()
        while not engine.ready:
            await asyncio.sleep(0.001)
        tokens, _ = await collect(engine.generate(GenerationRequest([3], max_new_tokens=450)))
        assert tokens == expected([3], 450)
        assert executor.asked_blocks == [None, 256, 256]

    serve(test, max_total_tokens=flag, max_input_tokens=flag and flag - 1)


def test_a_request_that_dies_at_its_last_token_fails_alone() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.001
        executor.poisonous[1] = 29  # the first request's

        async def good(number: int) -> None:
            tokens, _ = await collect(engine.generate(GenerationRequest([number, 1], max_new_tokens=60)))
            assert tokens == expected([number, 1], 60)

        async def bad() -> None:
            with pytest.raises(WorkerLost, match="is not tried again"):
                await collect(engine.generate(GenerationRequest([5], max_new_tokens=30)))

        await asyncio.gather(bad(), *(good(number) for number in range(6)))
        assert executor.starts == 4

    serve(test)


def test_a_caller_that_leaves_frees_its_row_within_two_steps() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.002
        other = engine.generate(GenerationRequest([1], max_new_tokens=200))
        events = engine.generate(GenerationRequest([3], max_new_tokens=600))
        await anext(other)
        await anext(events)
        assert executor.shards is not None
        assert len(executor.shards.rows) == 2
        before = executor.shards.step
        await events.aclose()  # type: ignore[attr-defined]
        while len(executor.shards.rows) == 2:
            await asyncio.sleep(0)
        # Two plans were on their way already.
        assert executor.shards.step - before <= 3
        await other.aclose()  # type: ignore[attr-defined]

    serve(test)


def test_deadline() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.01
        with pytest.raises(DeadlineExceeded, match=r"0\.1 seconds"):
            await collect(engine.generate(GenerationRequest([3], max_new_tokens=600, timeout=0.1)))

    serve(test)


def test_overload_is_refused_at_once() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        executor.pace = 0.002
        streams = [engine.generate(GenerationRequest([n], max_new_tokens=400)) for n in range(3)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded):
            await anext(engine.generate(GenerationRequest([9])))
        await streams[0].aclose()  # type: ignore[attr-defined]
        tokens, _ = await collect(engine.generate(GenerationRequest([9], max_new_tokens=2)))
        assert tokens == expected([9], 2)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]

    serve(test, max_concurrent_requests=3)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (GenerationRequest([1] * 90), "must have less than 80 tokens. Given: 90"),
        (GenerationRequest([1] * 50, max_new_tokens=60), "must be <= 100. Given: 50 `inputs` tokens and 60"),
        (GenerationRequest([]), "cannot be empty"),
        (GenerationRequest("  "), "cannot be empty"),
        (GenerationRequest([997]), "token 997 does not exist"),
        (GenerationRequest([1], Sampling(logit_bias=((5000, 1.0),))), "names token 5000"),
    ],
)
def test_what_can_never_be_answered(request_: GenerationRequest, text: str) -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        with pytest.raises(InvalidRequest, match=text):
            await anext(engine.generate(request_))

    serve(test, max_input_tokens=80, max_total_tokens=100)


def test_truncate_keeps_the_end() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        request = GenerationRequest(words([1, 2, 3, 4, 5]), max_new_tokens=4, truncate=2)
        tokens, finish = await collect(engine.generate(request))
        assert tokens == expected([4, 5], 4)
        assert finish.prompt_length == 2

    serve(test)


def test_eos_ends_unless_ignored() -> None:
    wanted = expected([7], 20)
    end = wanted[8]
    first = wanted.index(end)

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        tokens, finish = await collect(engine.generate(GenerationRequest([7], max_new_tokens=20)))
        assert tokens == wanted[: first + 1]
        assert finish.reason is FinishReason.EOS
        tokens, finish = await collect(engine.generate(GenerationRequest([7], max_new_tokens=20, ignore_eos=True)))
        assert tokens == wanted
        assert finish.reason is FinishReason.LENGTH

    serve(test, eos=(end,))


@pytest.mark.parametrize("include", [True, False])
def test_stop_texts(include: bool) -> None:
    wanted = expected([7], 20)
    stop = f"{wanted[4]} w{wanted[5]}"

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        request = GenerationRequest([7], max_new_tokens=20, stop=("never", stop), include_stop=include)
        tokens, finish = await collect(engine.generate(request))
        assert tokens == wanted[:6]
        assert finish.reason is FinishReason.STOP
        assert finish.stop == stop
        whole = words(wanted[:6])
        assert finish.text.strip() == (whole if include else whole.removesuffix(stop))

    serve(test)


def test_stop_lets_streams_finish_and_refuses_new_ones() -> None:
    async def main() -> None:
        executor = FakeExecutor()
        executor.pace = 0.001
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake"), word_tokenizer(), executor, QUICK)
        await engine.start()
        running = asyncio.ensure_future(collect(engine.generate(GenerationRequest([1], max_new_tokens=50))))
        await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(engine.stop(30))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await anext(engine.generate(GenerationRequest([2])))
        tokens, _ = await running
        assert tokens == expected([1], 50)
        await stopping

    asyncio.run(main())


def test_tokenize_and_templates() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        pieces = await engine.tokenize("w3  w14")
        assert [(piece.id, piece.text, piece.start, piece.stop) for piece in pieces] == [
            (3, "w3", 0, 2),
            (14, "w14", 4, 7),
        ]
        with pytest.raises(TemplateError, match="no chat template"):
            await engine.render(Chat([{"role": "user", "content": "hello"}]))

    serve(test)


def test_limits_that_do_not_fit_the_cache() -> None:
    async def main() -> None:
        engine = Engine(
            GeneratorConfig.of(Path("fake"), "fake", max_total_tokens=5000), word_tokenizer(), FakeExecutor(), QUICK
        )
        with pytest.raises(StartError, match="max_total_tokens 5000 is more than"):
            await engine.start()

    asyncio.run(main())


def test_stop_says_a_cancel_again_that_was_lost() -> None:
    """`asyncio.wait_for` forgets a cancel that comes together with its result (Python 3.11 and older)."""

    async def deaf() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def main() -> None:
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake"), word_tokenizer(), FakeExecutor(), QUICK)
        await engine.start()
        (lane,) = engine._lanes.all
        assert lane._task is not None
        lane._task.cancel()
        lane._task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        await asyncio.wait_for(engine.stop(), 5)
        assert lane._task.done()

    asyncio.run(main())


async def ended(engine: Engine) -> None:
    """Waits until nothing is computed any more."""
    for _ in range(1000):
        if not engine.admission.used:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{engine.admission.used} generations keep their places")


def test_who_reads_slowly_keeps_no_place_and_loses_nothing() -> None:
    async def test(engine: Engine, executor: FakeExecutor) -> None:
        slow = [engine.generate(GenerationRequest([number], max_new_tokens=30)) for number in (1, 2)]
        begun = [await anext(events) for events in slow]
        assert all(isinstance(event, Start) for event in begun)
        with pytest.raises(Overloaded):
            await collect(engine.generate(GenerationRequest([3], max_new_tokens=4)))
        await ended(engine)
        tokens, _ = await collect(engine.generate(GenerationRequest([3], max_new_tokens=4)))
        assert tokens == expected([3], 4)
        for number, events in zip((1, 2), slow):
            rest = [event async for event in events]
            assert [event.info.id for event in rest if isinstance(event, Token)] == expected([number], 30)
            assert isinstance(rest[-1], Finish)

    serve(test, max_concurrent_requests=2)


def test_what_nobody_takes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "UNREAD", 70)

    async def test(engine: Engine, executor: FakeExecutor) -> None:
        slow = []
        for number in (1, 2, 3):  # 30 tokens each: two of them fit
            slow.append(engine.generate(GenerationRequest([number], max_new_tokens=30)))
            await anext(slow[-1])
            await ended(engine)
        with pytest.raises(Cancelled, match="too slowly"):
            await anext(slow[0])
        for number, events in zip((2, 3), slow[1:]):
            rest = [event async for event in events]
            assert [event.info.id for event in rest if isinstance(event, Token)] == expected([number], 30)

    serve(test)
