"""Images without a vision worker: rows are drawn by a hash of the image."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from inflight.contract import EncodedImage, Grid, Media, SeenImage
from inflight.errors import InvalidRequest, Unavailable


class FakeInput:
    """A family that writes an image of `grid.rows` runs of `grid.columns` tokens as words."""

    placeholder = "<image>"
    before, after = "w900", "w901"
    filler_id: int | None = None

    def __init__(self, token: str = "w3", token_id: int = 3, hidden: int = 2, whole: bool = False) -> None:
        self._token = token
        self.token_id = token_id
        self.hidden = hidden
        self.whole = whole

    def text(self, grid: Grid) -> str:
        return "".join(f" {self.before}{f' {self._token}' * count}" for count in self.runs(grid)) + f" {self.after} "

    def runs(self, grid: Grid) -> list[int]:
        return [grid.columns] * grid.rows

    @property
    def together(self) -> int:
        return max(self.runs(Grid(1, 1))) if self.whole else 0

    def positions(self, grid: Grid) -> Grid | None:
        return None


class FakeVision:
    """Encodes images at once, or when `go` is set. The pixels' height and width are the runs and their length.

    Attributes:
        started, stopped: how often.
        encoding: images that wait for `go`.
        asked: images of all calls, with their tenants.
        failure: what the next calls raise.
        forgets: it keeps the rows of no image.
        forgotten: digests of images that it encoded then.
        spared: images that were not encoded for that.
    """

    def __init__(self, input: FakeInput | None = None) -> None:
        self.input = input or FakeInput()
        self.started = self.stopped = self.encoding = 0
        self.asked: list[tuple[Media, str]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.forgets = False
        self.forgotten: dict[bytes, None] = {}
        self.spared: list[SeenImage] = []

    async def fetched(self, media: Sequence[Media]) -> tuple[Media, ...]:
        return tuple(each if each.url is None else image(*map(int, each.url.split(","))) for each in media)

    async def encode(self, media: Sequence[Media], tenant: str = "", alone: bool | None = None) -> list[EncodedImage]:
        self.asked += [(each, tenant) for each in media]
        self.encoding += len(media)
        try:
            await self.go.wait()
        finally:
            self.encoding -= len(media)
        if self.failure is not None:
            raise self.failure
        found = [self.encoded(each) for each in media]
        if self.forgets:
            self.forgotten.update(dict.fromkeys(each.digest for each in found))
        return found

    async def seen(self, media: Sequence[Media], tenant: str = "") -> list[SeenImage | None]:
        encoded = [self.encoded(each) for each in media]
        return [SeenImage(each.digest, each.grid) if each.digest in self.forgotten else None for each in encoded]

    def skipped(self, images: Sequence[SeenImage]) -> None:
        self.spared += images

    def encoded(self, media: Media) -> EncodedImage:
        if media.pixels is None:
            raise InvalidRequest("the image cannot be decoded")
        digest = blake2b(media.pixels.tobytes(), digest_size=16).digest()
        draw = np.random.default_rng(np.frombuffer(digest, np.uint32))
        grid = Grid(*media.pixels.shape[:2])
        count = sum(self.input.runs(grid))
        return EncodedImage(digest, grid, draw.standard_normal((count, self.input.hidden), np.float32))

    async def start(self) -> None:
        self.started += 1

    async def stop(self) -> None:
        self.stopped += 1
        self.failure = Unavailable("the server stops")
        self.go.set()


def image(number: int, runs: int = 1, length: int = 6) -> Media:
    """An image of `runs` runs of `length` tokens."""
    return Media(pixels=np.full((runs, length, 3), number, np.uint8))
