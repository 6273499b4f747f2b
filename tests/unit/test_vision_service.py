"""Images on their way to the worker: the queue, the cache, who shares and who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from inflight.config import VisionConfig
from inflight.contract import Grid, ImageInput, Media
from inflight.errors import InvalidRequest, Overloaded, Unavailable, WorkerLost
from inflight.metrics import Metrics
from inflight.vision.digest import digest
from inflight.vision.encoder import Encoded
from inflight.vision.service import VisionService

IMAGE = bytes(range(16))


class FakeEncoder:
    """Encodes a file as its bytes, when it is let."""

    def __init__(self) -> None:
        self.identity = "fake"
        self.alone_matters = False
        self.pids: list[int] = []
        self.seen: list[bytes] = []
        self.ended: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.stopped = False

    @property
    def input(self) -> ImageInput:
        raise NotImplementedError

    async def start(self) -> None: ...

    async def encode(self, image: Media, alone: bool = True, timeout: float | None = None) -> Encoded:
        assert image.url is None
        data = image.data if image.data is not None else np.asarray(image.pixels).tobytes()
        self.seen.append(data)
        await self.gate.wait()
        self.ended.append(data)
        if data.startswith(b"bad"):
            raise InvalidRequest("invalid image: it is bad")
        if data.startswith(b"kill"):
            raise WorkerLost("the image cannot be decoded")
        if data.startswith(b"fault"):
            raise KeyError("fault")
        return Encoded(Grid(1, 1), np.frombuffer(data, np.uint8).astype(np.float32)[:, None] + np.float32(alone))

    async def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None: ...


Body = Callable[[VisionService, FakeEncoder], Coroutine[Any, Any, None]]


def served(
    body: Body,
    fetch: Callable[[str], Coroutine[Any, Any, bytes]] | None = None,
    metrics: Metrics | None = None,
    **limits: Any,
) -> None:
    """Runs `body` with a service, and checks that nothing is left behind."""

    async def nothing(url: str) -> bytes:
        raise InvalidRequest("Could not fetch image: there is nothing")

    async def run() -> None:
        encoder = FakeEncoder()
        images = None if metrics is None else metrics.images
        service = VisionService(encoder, VisionConfig(**limits), fetch or nothing, images, "m")
        await service.start()
        await body(service, encoder)
        encoder.gate.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert service.waiting == 0
        assert not service._jobs
        assert not service._encoding
        assert not service._fetching
        await service.stop()
        assert service.kept == 0
        assert encoder.stopped
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come to this")


def files(*contents: bytes) -> list[Media]:
    return [Media(data=content) for content in contents]


def test_images_come_back_in_order_and_from_the_cache_the_second_time() -> None:
    metrics = Metrics()

    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        first = await service.encode(files(b"one", b"two", b"one"))
        assert encoder.seen == [b"one", b"two"]
        assert [len(image.rows) for image in first] == [3, 3, 3]
        assert first[0].digest == first[2].digest != first[1].digest
        again = await service.encode(files(b"two", b"one"))
        assert encoder.seen == [b"one", b"two"]
        assert again[0].rows is first[1].rows
        assert again[0].digest == first[1].digest
        assert service.kept == first[0].rows.nbytes + first[1].rows.nbytes
        text = metrics.render().decode()
        for line in (
            'inflight_images_total{model="m",outcome="encoded"} 2.0',
            'inflight_images_total{model="m",outcome="shared"} 1.0',
            'inflight_images_total{model="m",outcome="cached"} 2.0',
            'inflight_image_tokens_total{model="m"} 15.0',
            'inflight_image_queue_size{model="m"} 0.0',
            f'inflight_image_cache_bytes{{model="m"}} {service.kept}.0',
            'inflight_image_encode_seconds_count{model="m"} 2.0',
        ):
            assert line in text

    served(body, metrics=metrics)
    assert "inflight_image_queue_size{" not in metrics.render().decode()


def test_tenants_share_nothing() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        for tenant in ("a", "b", "a"):
            await service.encode(files(b"one"), tenant)
        assert encoder.seen == [b"one", b"one"]
        await asyncio.gather(service.encode(files(b"two"), "a"), service.encode(files(b"two"), "b"))
        assert encoder.seen[2:] == [b"two", b"two"]

    served(body)


def test_the_cache_is_bounded_and_forgets_what_was_asked_for_longest_ago() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        await service.encode(files(IMAGE, b"two"))  # 64 and 12 bytes of rows
        await service.encode(files(IMAGE))
        await service.encode(files(b"three"))  # 20 bytes more: `two` goes
        assert service.kept == 84
        await service.encode(files(IMAGE, b"three"))
        assert len(encoder.seen) == 3
        await service.encode(files(b"two"))
        assert len(encoder.seen) == 4
        await service.encode(files(bytes(100)))  # too large to be kept
        assert service.kept <= 90

    served(body, media_cache_memory=90)


def test_what_requests_hold_is_bounded() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        one, two = await service.encode(files(b"1" * 10, b"2" * 10))  # 40 bytes each; one of them is kept
        assert (service.kept, service.held) == (40, 40)
        (three,) = await service.encode(files(b"3" * 10))
        assert service.held == 80
        with pytest.raises(Overloaded, match="--vision-memory"):
            await service.encode(files(b"4"))
        assert await service.encode(files(b"3" * 10)) == [three], "the cache answers"
        del one
        assert service.held == 40
        encoder.gate.clear()
        coming = asyncio.ensure_future(service.encode(files(b"4")))
        await until(lambda: bool(service._encoding))
        with pytest.raises(Overloaded, match="--vision-memory"):
            await service.encode(files(b"5"))
        encoder.gate.set()
        await coming
        del two, three, coming
        assert service.held == 0
        await service.encode(files(*(bytes([n]) * 99 for n in range(3))))  # nobody holds anything: any number may

    served(body, media_cache_memory=40, vision_memory=100)


def test_what_was_forgotten_is_known_by_its_grid() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        assert await service.seen(files(b"one")) == [None]
        (one,) = await service.encode(files(b"one"))
        assert await service.seen(files(b"one")) == [None], "it is kept"
        await service.encode(files(b"two", b"thirty"))
        assert service.kept <= 40
        assert await service.seen(files(b"one", b"thirty")) == [(one.digest, one.grid), None]
        assert encoder.seen == [b"one", b"two", b"thirty"]
        assert await service.seen(files(b"new", b"one")) == [None, (one.digest, one.grid)]
        assert await service.seen(files(b"one"), "other") == [None]
        assert await service.fetched(files(b"one")) == tuple(files(b"one"))
        assert await service.fetched([Media(url="http://a/one")]) == tuple(files(b"one"))
        with pytest.raises(InvalidRequest, match="404"):
            await service.fetched([Media(url="http://a/none")])
        assert not service.waiting
        large = bytes(50)
        await service.encode(files(large))
        assert None not in await service.seen(files(large))
        assert await service.seen(files(b"thirty")) == [None], "what is never kept drives nothing out"

    async def fetch(url: str) -> bytes:
        if url.endswith("none"):
            raise InvalidRequest("404")
        return url.rpartition("/")[2].encode()

    served(body, fetch, media_cache_memory=40)


def test_an_image_on_its_way_is_awaited_also_when_the_first_who_asked_leaves() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        encoder.gate.clear()
        first = asyncio.ensure_future(service.encode(files(b"one")))
        await until(lambda: bool(encoder.seen))
        second = asyncio.ensure_future(service.encode(files(b"one")))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        encoder.gate.set()
        assert len((await second)[0].rows) == 3
        assert encoder.seen == [b"one"]

    served(body)


def test_who_leaves_takes_along_what_only_they_waited_for() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        encoder.gate.clear()
        running = asyncio.ensure_future(service.encode(files(b"1")))
        leaving = asyncio.ensure_future(service.encode(files(b"2", b"3", b"4")))
        staying = asyncio.ensure_future(service.encode(files(b"4", b"5")))
        await until(lambda: encoder.seen == [b"1", b"2"])
        assert service.waiting == 3
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: encoder.seen == [b"1", b"2", b"4"])
        assert service.waiting == 1
        encoder.gate.set()
        await running
        await staying
        assert encoder.ended == [b"1", b"4", b"5"]

    served(body)


def test_who_leaves_at_once_leaves_nothing() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        for turns in range(12):
            call = asyncio.ensure_future(service.encode(files(b"a%d" % turns, b"b%d" % turns)))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
        await service.encode(files(b"next"))
        assert encoder.ended[-1] == b"next"

    served(body)


def test_what_the_worker_is_at_is_kept_although_its_caller_left() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        encoder.gate.clear()
        call = asyncio.ensure_future(service.encode(files(b"one")))
        await until(lambda: bool(encoder.seen))
        call.cancel()
        await asyncio.wait([call])
        encoder.gate.set()
        await service.encode(files(b"one"))
        assert encoder.seen == [b"one"]

    served(body)


def test_images_of_requests_are_encoded_in_the_order_in_which_they_came() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        await asyncio.gather(*(service.encode(files(b"%da" % call, b"%db" % call)) for call in range(5)))
        assert encoder.seen == [b"%d%s" % (call, part) for call in range(5) for part in (b"a", b"b")]

    served(body)


def test_the_queue_is_bounded() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        await service.encode(files(b"known"))
        encoder.gate.clear()
        calls = [asyncio.ensure_future(service.encode(files(b"%d" % each))) for each in range(6)]  # 2 run, 4 wait
        await until(lambda: service.waiting == 4)
        with pytest.raises(Overloaded):
            await service.encode(files(b"more"))
        with pytest.raises(Overloaded):
            await service.encode([Media(url="http://x.example/")])
        assert len((await service.encode(files(b"known")))[0].rows) == 5  # needs no place
        same = asyncio.ensure_future(service.encode(files(b"5")))  # neither does this
        await asyncio.sleep(0)
        encoder.gate.set()
        await asyncio.gather(same, *calls)
        await service.encode(files(*(b"large%d" % each for each in range(7))))  # nobody waits: let in

    served(body, vision_queue=4)


def test_a_bad_image_fails_its_requests_only() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        results = await asyncio.gather(
            *(
                service.encode(files(*contents))
                for contents in ((b"a",), (b"b", b"bad"), (b"bad",), (b"kill",), (b"c",))
            ),
            return_exceptions=True,
        )
        assert isinstance(results[0], list)
        assert isinstance(results[4], list)
        assert str(results[1]) == "invalid image: it is bad (image 2 of 2)"
        assert str(results[2]) == "invalid image: it is bad"
        assert isinstance(results[3], WorkerLost)
        with pytest.raises(InvalidRequest):  # failures are not kept
            await service.encode(files(b"bad"))
        assert encoder.seen.count(b"bad") == 2

    served(body)


def test_a_fault_of_the_encoder_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        bad, good = await asyncio.gather(
            service.encode(files(b"fault")), service.encode(files(b"good")), return_exceptions=True
        )
        assert "fault" in str(bad)
        assert isinstance(good, list)

    served(body)


def test_stopping_fails_who_waits() -> None:
    async def slow(url: str) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        encoder.gate.clear()
        calls = [asyncio.ensure_future(service.encode(files(b"%d" % each))) for each in range(5)]
        calls.append(asyncio.ensure_future(service.encode([Media(url="http://x.example/")])))
        await until(lambda: service.waiting == 4)
        await service.stop()
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, Unavailable)
        with pytest.raises(Unavailable):
            await service.encode(files(b"late"))

    served(body, slow)


def test_addresses_are_fetched_once_in_a_request_and_not_kept() -> None:
    fetched: list[str] = []

    async def fetch(url: str) -> bytes:
        fetched.append(url)
        await asyncio.sleep(0)
        if "missing" in url:
            raise InvalidRequest("Could not fetch image: it is missing")
        return url.encode()

    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        urls = ["http://a.example/1", "http://a.example/2", "http://a.example/1"]
        images = await service.encode([Media(url=url) for url in urls])
        assert fetched == urls[:2]
        assert images[0].digest == images[2].digest
        await service.encode([Media(url=urls[0])])
        assert fetched[2:] == urls[:1]  # its content may have changed
        assert len(encoder.seen) == 2
        same = await service.encode([Media(data=urls[0].encode())])
        assert same[0].digest == images[0].digest
        with pytest.raises(InvalidRequest, match=r"Could not fetch image: it is missing \(image 2 of 2\)"):
            await service.encode([Media(url=urls[0]), Media(url="http://missing.example/")])

    served(body, fetch)


@pytest.mark.parametrize(
    ("media", "text"),
    [
        (files(*[b"x"] * 9), "the request has 9 images; at most 8 are read (--images-per-request)"),
        (files(bytes(101)), "Image size 101 bytes exceeds maximum allowed size of 100 bytes"),
        ([Media()], "an image has either the bytes of a file, or pixels, or an address"),
        (
            [Media(data=b"", url="http://x.example")],
            "an image has either the bytes of a file, or pixels, or an address",
        ),
        ([Media(pixels=np.zeros((2, 2), np.uint8))], "pixels are uint8 [height, width, 3]; these are uint8 [2, 2]"),
        ([Media(pixels=np.zeros((2, 2, 3)))], "these are float64 [2, 2, 3]"),
        ([Media(pixels=np.zeros((0, 2, 3), np.uint8))], "it has 2 x 0 pixels"),
        ([Media(pixels=np.zeros((41, 50, 3), np.uint8))], "50 x 41 = 2050 pixels; at most 2000 are read"),
        ([Media(pixels=np.zeros((1, 201, 3), np.uint8))], "one side may be 200 times the other at most"),
    ],
)
def test_limits_are_named(media: list[Media], text: str) -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await service.encode(media)
        assert text in str(caught.value)
        assert not encoder.seen

    served(body, image_max_bytes=100, image_max_pixels=2000)


def test_whether_an_image_is_alone_matters_where_the_family_says_so() -> None:
    async def body(service: VisionService, encoder: FakeEncoder) -> None:
        await service.encode(files(b"one"))
        await service.encode(files(b"one", b"two"))
        assert encoder.seen == [b"one", b"two"]
        encoder.alone_matters = True
        alone = await service.encode(files(b"three"))
        several = await service.encode(files(b"three", b"four"))
        assert encoder.seen[2:] == [b"three", b"three", b"four"]
        assert alone[0].digest != several[0].digest

    served(body)


def test_a_digest_is_of_all_that_the_rows_depend_on() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    limits = VisionConfig()

    async def digests() -> list[bytes]:
        return [
            await digest(Media(data=pixels.tobytes()), "model", limits, True),
            await digest(Media(data=pixels.tobytes()[:-1]), "model", limits, True),
            await digest(Media(data=pixels.tobytes(), detail="low"), "model", limits, True),
            await digest(Media(data=pixels.tobytes()), "model", limits, False),
            await digest(Media(data=pixels.tobytes()), "mode", limits, True),
            await digest(Media(data=pixels.tobytes()), "model", VisionConfig(image_max_tokens=64), True),
            await digest(Media(pixels=pixels), "model", limits, True),
            await digest(Media(pixels=pixels.reshape(4, 2, 3)), "model", limits, True),
            await digest(Media(pixels=pixels.transpose(1, 0, 2)), "model", limits, True),
            await digest(Media(data=bytes(3 << 20)), "model", limits, True),
        ]

    found = asyncio.run(digests())
    assert len(set(found)) == len(found)
    assert {len(one) for one in found} == {16}
    assert asyncio.run(digests()) == found
    high = asyncio.run(digest(Media(data=pixels.tobytes(), detail="high"), "model", limits, True))
    assert high == found[0]
