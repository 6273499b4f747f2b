"""Requests with images: what is refused, what waits, what becomes of the prompt. Shards and images are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from inflight.config import GeneratorConfig
from inflight.contract import Finish, GenerationRequest, Media, Start, Vision, whole
from inflight.engine import Engine
from inflight.errors import DeadlineExceeded, InvalidRequest, StartError, Unavailable
from tests.fake_shards import FakeExecutor, expected
from tests.fake_vision import FakeInput, FakeVision, image
from tests.unit.test_engine import QUICK, word_tokenizer

T = TypeVar("T")


def serve(
    test: Callable[[Engine, FakeVision, FakeExecutor], Awaitable[T]], vision: FakeVision | None = None, **settings: Any
) -> T:
    """Runs a test against a started engine with images, and looks that nothing of it is left."""

    async def main() -> T:
        eyes, executor = vision or FakeVision(), FakeExecutor()
        config = GeneratorConfig.of(Path("fake"), "fake", **settings)
        engine = Engine(config, word_tokenizer(), executor, QUICK, vision=eyes)
        await engine.start()
        try:
            result = await asyncio.wait_for(test(engine, eyes, executor), 60)
            scheduler = engine._lanes.all[0].scheduler
            for _ in range(500):
                if not engine.streams and not scheduler.in_flight and not scheduler.requests:
                    break
                await asyncio.sleep(0.01)
            assert not engine.streams
            assert not engine.waiting
            assert engine.admission.room == engine.info.policy.max_concurrent_requests
            assert not scheduler.requests
            scheduler.plan()
            assert scheduler.pool.free == scheduler.pool.count, "blocks are lost"
        finally:
            await engine.stop()
        assert eyes.started == 1
        assert eyes.stopped
        assert not eyes.encoding
        return result

    return asyncio.run(main())


def asked(prompt: str, *media: Media, **fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt, max_new_tokens=fields.pop("max_new_tokens", 4), media=media, **fields)


def wanted(vision: FakeVision, prompt: list[int | Media], count: int = 4) -> list[int]:
    """The tokens of a request that is alone. Images of the prompt stand with the markers around them."""
    tokens: list[int] = []
    rows: dict[int, bytes] = {}
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
            continue
        encoded = vision.encoded(part)
        for index in range(len(encoded.rows)):
            if index % encoded.grid.columns == 0:
                tokens.append(900)
            rows[len(tokens)] = encoded.rows[index].tobytes()
            tokens.append(vision.input.token_id if vision.input.token_id < 997 else 0)
        tokens.append(901)
    return expected(tokens, count, rows=rows)


def ids(answer: Any) -> list[int]:
    return [token.info.id for token in answer.tokens]


def test_images_stand_where_the_prompt_says() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        assert engine.info.image_placeholder == "<image>"
        one, two = image(1), image(2, runs=2, length=3)
        request = asked("w5 <image> w6 <image><image> w7", one, two, one, tenant="someone")
        answer = await whole(engine, request)
        assert ids(answer) == wanted(vision, [5, one, 6, two, one, 7])
        assert answer.start.prompt_length == 3 + 8 + 9 + 8
        assert vision.asked == [(each, "someone") for each in (one, two, one)]
        other = await whole(engine, replace(request, media=(one, one, two), prompt="w5 <image> w6 <image><image> w7"))
        assert ids(other) == wanted(vision, [5, one, 6, one, two, 7])
        assert other.start.cached == 8, "up to the first image that differs"
        cached = [(await whole(engine, replace(request, tenant=name))).start.cached for name in ("someone", "else")]
        assert cached == [24, 0], "all whole blocks; tenants share nothing"

    serve(test)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (asked("w5", image(1)), r"the prompt has 0 places for images \(`<image>`\), and the request has 1 images"),
        (asked("w5 <image>"), "the prompt has 1 places for images .* and the request has 0 images"),
        (asked("w5 w3 <image>", image(1)), "markers of images that stand for no image"),
        (asked("w5 <image> w3", image(1)), "markers of images that stand for no image"),
        (asked("w5 w3"), "markers of images that stand for no image"),
        (asked("<image>", Media(data=b"no image")), "the image cannot be decoded"),
        (asked("<image> w1", image(1), truncate=5), "`truncate` would cut an image: .* begins at 1"),
        (asked("<image>", image(1), embed=True), "images cannot be embedded"),
        (asked("<image>", image(1, length=200)), "must have less than 100 tokens. Given: 200 tokens of images"),
        (asked("<image> w1" + " w1" * 92, image(1)), "must have less than 100 tokens. Given: 101"),
        (asked("<image>", image(1), max_new_tokens=0), "`max_new_tokens` must be"),
        (asked("<image>", image(1), adapter="none"), "adapter 'none' is not served"),
        (GenerationRequest([1, 2], media=(image(1),)), "a prompt of token ids cannot have images"),
    ],
)
def test_what_is_refused(request_: GenerationRequest, error: str) -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        with pytest.raises(InvalidRequest, match=error):
            await whole(engine, request_)
        assert ids(await whole(engine, asked("w1"))) == expected([1], 4)

    serve(test, max_input_tokens=100, max_total_tokens=200)


def test_what_can_be_truncated_is() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        answer = await whole(engine, asked("w5 w6 w7 <image> w8", image(1), truncate=10))
        assert answer.start.prompt_length == 10
        assert ids(answer) == wanted(vision, [7, image(1), 8])

    serve(test)


def test_a_model_of_texts_says_so() -> None:
    async def main() -> None:
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake"), word_tokenizer(), FakeExecutor(), QUICK)
        await engine.start()
        try:
            assert engine.info.image_placeholder is None
            with pytest.raises(InvalidRequest, match="model 'fake' reads text only; it has no image input"):
                await whole(engine, asked("w1", image(1)))
            assert ids(await whole(engine, asked("w5 w3"))) == expected([5, 3], 4)
        finally:
            await engine.stop()

    asyncio.run(main())


def test_a_token_that_the_embedding_lacks() -> None:
    """Gemma 3 has the token of images behind its vocabulary."""

    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        assert ids(await whole(engine, asked("w5 <image>", image(1)))) == wanted(vision, [5, image(1)])

    input = FakeInput(whole=True)
    vision = FakeVision(input)
    tokenizer = word_tokenizer()

    async def main() -> None:
        executor = FakeExecutor(vocab=950)
        input.token_id, input._token = 960, "w960"
        engine = Engine(GeneratorConfig.of(Path("fake"), "fake"), tokenizer, executor, QUICK, vision=vision)
        await engine.start()
        try:
            answer = await whole(engine, asked("w5 <image>", image(1)))
        finally:
            await engine.stop()
        encoded = vision.encoded(image(1))
        rows = {2 + index: encoded.rows[index].tobytes() for index in range(6)}
        assert ids(answer) == expected([5, 900, *[0] * 6, 901], 4, rows=rows)

    asyncio.run(main())


def test_waiting_for_an_image_is_waiting() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        vision.go.clear()
        request = asked("<image>", image(1))
        waiting = [asyncio.ensure_future(whole(engine, request)) for _ in range(3)]
        await until(lambda: vision.encoding == 3)
        assert engine.waiting == engine.load.waiting == engine.streams == 3
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await until(lambda: vision.encoding == 2)
        assert engine.waiting == engine.streams == 2
        with pytest.raises(DeadlineExceeded, match=r"longer than its 0\.05 seconds"):
            await whole(engine, replace(request, timeout=0.05))
        await until(lambda: vision.encoding == 2)
        assert ids(await whole(engine, asked("w1"))) == expected([1], 4), "texts do not wait for images"
        vision.go.set()
        for task in waiting[1:]:
            assert ids(await task) == wanted(vision, [image(1)])

    serve(test)


def test_a_stop_ends_what_waits() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        vision.go.clear()
        waiting = asyncio.ensure_future(whole(engine, asked("<image>", image(1))))
        await until(lambda: vision.encoding == 1)
        await engine.stop()
        with pytest.raises(Unavailable, match="the server stops"):
            await waiting

    serve(test)


def test_a_loss_of_the_shards_replays_images() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        executor.pace = 0.001

        async def one(number: int) -> None:
            request = asked(f"w{number % 3} <image> w5", image(number % 4, length=20), max_new_tokens=60)
            answer = await whole(engine, request)
            assert ids(answer) == wanted(vision, [number % 3, image(number % 4, length=20), 5], 60)

        async def killer() -> None:
            for _ in range(4):
                await asyncio.sleep(0.04)
                executor.kill()

        await asyncio.gather(killer(), *(one(number) for number in range(12)))
        assert executor.starts > 2
        assert len(vision.asked) == 12, "the images are kept"

    serve(test, max_batch_prefill_tokens=16)


def test_images_whose_keys_are_cached_are_not_encoded() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        pool = engine._lanes.all[0].scheduler.pool
        one, two = image(1, length=20), image(2, length=9)
        first = asked("w5 <image> w6 <image> w7 w8 w9 w10", one, two)
        later = asked("w5 <image> w6 <image> w7 w8 w9 w10 w11 w12", one, two)
        other = asked("w5 <image> w6 <image> w7 w8 w9 w10", one, image(3, length=9))
        vision.forgets = True
        await whole(engine, first)
        right = wanted(vision, [5, one, 6, two, 7, 8, 9, 10, 11, 12])
        assert ids(await whole(engine, later)) == right
        assert (len(vision.asked), len(vision.spared)) == (2, 2)
        assert ids(await whole(engine, other)) == wanted(vision, [5, one, 6, image(3, length=9), 7, 8, 9, 10])
        assert (len(vision.asked), len(vision.spared)) == (3, 3), "one of its images is new: the other is skipped"
        moved = replace(other, media=(image(4, length=9), one))
        assert ids(await whole(engine, moved)) == wanted(vision, [5, image(4, length=9), 6, one, 7, 8, 9, 10])
        assert (len(vision.asked), len(vision.spared)) == (6, 3), "keys behind a new image are new"
        addressed = replace(later, media=(Media(url="1,1,20"), Media(url="2,1,9")))
        assert ids(await whole(engine, addressed)) == right
        assert (len(vision.asked), len(vision.spared)) == (6, 5), "fetched, not encoded"

        taking = asyncio.ensure_future(whole(engine, later))  # its blocks are taken by others before it has a row
        open_ = engine._streams.open

        def opened(*given: Any) -> Any:
            pool.release(pool.take(pool.free) or [])
            return open_(*given)

        engine._streams.open = opened  # type: ignore[method-assign, assignment]
        assert ids(await taking) == right
        engine._streams.open = open_  # type: ignore[method-assign]
        assert (len(vision.asked), len(vision.spared)) == (8, 7)

        vision.go.clear()
        executor.pace = 0.001
        lost = asyncio.ensure_future(whole(engine, replace(later, max_new_tokens=50)))
        while not engine.running:
            await asyncio.sleep(0.001)
        executor.kill()
        while not vision.encoding:
            await asyncio.sleep(0.001)
        assert engine.waiting == 1
        gives_up = asyncio.ensure_future(whole(engine, replace(other, timeout=0.01, prompt="w1 " + str(other.prompt))))
        with pytest.raises(DeadlineExceeded):
            await gives_up
        text = await whole(engine, asked("w5"))
        assert ids(text) == expected([5], 4), "others go on"
        vision.go.set()
        assert ids(await lost) == wanted(vision, [5, one, 6, two, 7, 8, 9, 10, 11, 12], 50)

    serve(test)


def test_the_prompt_is_told_without_images() -> None:
    async def test(engine: Engine, vision: FakeVision, executor: FakeExecutor) -> None:
        events = engine.generate(asked("w5 <image> w6", image(1, length=3), prompt_tokens=True))
        start = await anext(events)
        assert isinstance(start, Start)
        assert [token.text for token in start.prompt] == ["w5", "w900", "", "", "", "w901", "w6"]
        async for event in events:
            assert not isinstance(event, Finish) or event.prompt_length == 7

    serve(test)


class Broken(FakeVision):
    async def start(self) -> None:
        raise StartError("the vision worker: no such file")


@pytest.mark.parametrize(
    ("vision", "settings", "error"),
    [
        (Broken, {}, "the vision worker: no such file"),
        (lambda: FakeVision(LongInput(whole=True)), {"max_batch_prefill_tokens": 100}, "must be at least 256"),
    ],
)
def test_what_cannot_start(vision: Callable[[], FakeVision], settings: dict[str, Any], error: str) -> None:
    async def main() -> None:
        eyes: Vision = vision()
        engine = Engine(
            GeneratorConfig.of(Path("fake"), "fake", **settings), word_tokenizer(), FakeExecutor(), QUICK, vision=eyes
        )
        with pytest.raises(StartError, match=error):
            await engine.start()
        assert isinstance(eyes, FakeVision)
        assert eyes.stopped == 1
        await engine.stop()

    asyncio.run(main())


class LongInput(FakeInput):
    """Gemma 3's images have 256 tokens."""

    def runs(self, grid: Any) -> list[int]:
        return [256]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)
