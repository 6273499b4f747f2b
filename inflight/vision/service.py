"""Images of a model, from what a request holds to rows for its prompt:

    Media -> fetched -> digest -> the cache, or the same image on its way, or a place in the queue -> EncodedImage

The worker gets images in the order in which they came, those of a request one behind the other. What is waited for
belongs to those who wait: an image whose last caller left goes out of the queue, unless the worker is at it; then its
rows are kept for whoever asks next.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

from inflight.config import VisionConfig
from inflight.contract import EncodedImage, Grid, ImageInput, Media, SeenImage
from inflight.errors import (
    InflightError,
    InvalidRequest,
    ModelError,
    Overloaded,
    Unavailable,
    describe,
)
from inflight.metrics import ImageMetrics
from inflight.vision.digest import digest
from inflight.vision.encoder import Encoder
from inflight.vision.limits import check_bytes, check_sides

log = logging.getLogger(__name__)

AHEAD = 2
"""Images that the encoder has at most: it decodes the second while it encodes the first."""
LONGEST = 600.0
"""Seconds after which an image is given up that the encoder was given."""
GONE = 1 << 14
"""Images that are not kept any more whose grids are known."""
STOPS = "the server stops"


class Fetch(Protocol):
    """Fetches files of images (`inflight.vision.fetch`)."""

    async def __call__(self, url: str) -> bytes:
        """
        Raises:
            InvalidRequest: the address is not allowed, or gives no file; the text says why.
        """


class _Key(NamedTuple):
    tenant: str
    digest: bytes


@dataclass(eq=False)
class _Job:
    """An image that waits for the worker, or is with it (`task`).

    Attributes:
        waiters: calls that want it.
        done: its result. Only the service sets it; callers wait for it without owning it.
    """

    key: _Key
    image: Media
    alone: bool
    done: asyncio.Future[EncodedImage]
    waiters: int = 0
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Call:
    """What one call of `encode` holds until it ends.

    Attributes:
        places: images that are not in the queue yet, and count as waiting.
        jobs: those it waits for.
    """

    places: int = 0
    jobs: list[_Job] = field(default_factory=list)


class VisionService:
    """The `Vision` of a model.

    Args:
        name: of the model, for metrics.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: VisionConfig,
        fetch: Fetch,
        metrics: ImageMetrics | None = None,
        name: str = "",
    ) -> None:
        self._encoder = encoder
        self._config = config
        self._fetch = fetch
        self._metrics = metrics
        self._name = name
        self._cache: OrderedDict[_Key, EncodedImage] = OrderedDict()
        self._kept = 0
        self._alive = 0  # bytes of encoded images that somebody holds, the cache included
        self._largest = 0
        self._gone: OrderedDict[_Key, Grid] = OrderedDict()  # not in the cache any more
        self._jobs: dict[_Key, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._places = 0
        self._encoding: list[_Job] = []
        self._ended = 0.0
        self._fetching: dict[asyncio.Task[bytes], None] = {}
        self._closed = False

    @property
    def input(self) -> ImageInput:
        return self._encoder.input

    @property
    def waiting(self) -> int:
        """Images that are fetched, or wait for the worker."""
        return self._places + len(self._queue)

    @property
    def kept(self) -> int:
        """Bytes in the cache."""
        return self._kept

    @property
    def held(self) -> int:
        """Bytes of encoded images that requests hold, those in the cache apart."""
        return self._alive - self._kept

    async def start(self) -> None:
        await self._encoder.start()
        if self._metrics is not None:
            self._metrics.watch(self._name, lambda: self.waiting, lambda: self.kept)

    async def stop(self) -> None:
        self._closed = True
        if self._metrics is not None:
            self._metrics.forget(self._name)
        for fetching in self._fetching:
            fetching.cancel()
        tasks = [job.task for job in self._encoding if job.task is not None]
        for job in list(self._jobs.values()):
            self._settle(job, Unavailable(STOPS))
        self._queue.clear()
        for task in tasks:
            task.cancel()
        await self._encoder.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._cache.clear()
        self._gone.clear()
        self._kept = 0

    async def fetched(self, media: Sequence[Media]) -> tuple[Media, ...]:
        if self._closed:
            raise Unavailable(STOPS)
        call = _Call()
        try:
            self._check(media)
            return tuple(await self._files(call, media))
        except (InflightError, asyncio.CancelledError) as error:
            self._count([_outcome(error)] * len(media))
            raise
        finally:
            self._leave(call)

    async def encode(self, media: Sequence[Media], tenant: str = "", alone: bool | None = None) -> list[EncodedImage]:
        if self._closed:
            raise Unavailable(STOPS)
        call = _Call()
        try:
            self._check(media)
            files = await self._files(call, media)
            alone = self._alone(media) if alone is None else alone
            keys = await self._keys(files, tenant, alone)
            if self._closed:
                raise Unavailable(STOPS)
            found, outcomes = self._join(call, files, keys, alone)
            images = []
            for number, one in enumerate(found, 1):
                with _numbered(number, len(found)):
                    images.append(one if isinstance(one, EncodedImage) else await _result(one))
        except (InflightError, asyncio.CancelledError) as error:
            self._count([_outcome(error)] * len(media))
            raise
        finally:
            self._leave(call)
        self._count(outcomes, sum(len(image.rows) for image in images))
        return images

    async def seen(self, media: Sequence[Media], tenant: str = "") -> list[SeenImage | None]:
        # What stands at an address may be another image by now.
        if self._closed or not self._gone or any(image.data is None and image.pixels is None for image in media):
            return [None] * len(media)
        keys = await self._keys(media, tenant, self._alone(media))
        grids = [None if key in self._cache else self._gone.get(key) for key in keys]
        return [grid and SeenImage(key.digest, grid) for key, grid in zip(keys, grids)]

    def skipped(self, images: Sequence[SeenImage]) -> None:
        self._count(["skipped"] * len(images), sum(sum(self.input.runs(image.grid)) for image in images))

    def _alone(self, media: Sequence[Media]) -> bool:
        return len(media) == 1 or not self._encoder.alone_matters

    async def _keys(self, media: Sequence[Media], tenant: str, alone: bool) -> list[_Key]:
        identity = self._encoder.identity
        alone = alone or not self._encoder.alone_matters
        return [_Key(tenant, await digest(image, identity, self._config, alone)) for image in media]

    def _check(self, media: Sequence[Media]) -> None:
        """
        Raises:
            InvalidRequest: too many images, or one that is over a limit at first sight.
        """
        limits = self._config
        if len(media) > limits.images_per_request:
            raise InvalidRequest(
                f"the request has {len(media)} images; at most {limits.images_per_request} are read "
                "(--images-per-request)"
            )
        for number, image in enumerate(media, 1):
            with _numbered(number, len(media)):
                if sum(part is not None for part in (image.data, image.pixels, image.url)) != 1:
                    raise InvalidRequest("an image has either the bytes of a file, or pixels, or an address")
                if image.data is not None:
                    check_bytes(len(image.data), limits.image_max_bytes)
                if image.pixels is not None:
                    shape = image.pixels.shape
                    if image.pixels.dtype != "uint8" or len(shape) != 3 or shape[2] != 3:
                        raise InvalidRequest(
                            "invalid image: pixels are uint8 [height, width, 3]; these are "
                            f"{image.pixels.dtype} {list(shape)}"
                        )
                    check_sides(shape[1], shape[0], limits.image_max_pixels)

    async def _files(self, call: _Call, media: Sequence[Media]) -> list[Media]:
        """The images with their bytes. Addresses are fetched all at the same time, each once.

        Raises:
            InvalidRequest: one cannot be fetched; the others are given up.
        """
        urls = list(dict.fromkeys(image.url for image in media if image.url is not None))
        if not urls:
            return list(media)
        self._admit(len(urls))
        call.places = len(urls)
        self._places += call.places
        tasks = {url: asyncio.ensure_future(self._fetched(url)) for url in urls}
        self._fetching.update(dict.fromkeys(tasks.values()))
        try:
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
            for number, image in enumerate(media, 1):
                with _numbered(number, len(media)):
                    if image.url is not None and tasks[image.url].done():
                        _raise_of(tasks[image.url])
            return [
                image if image.url is None else replace(image, data=tasks[image.url].result(), url=None)
                for image in media
            ]
        finally:
            for task in tasks.values():
                del self._fetching[task]
                task.cancel()
                task.add_done_callback(_retrieve)

    async def _fetched(self, url: str) -> bytes:
        began = time.perf_counter()
        try:
            return await self._fetch(url)
        finally:
            if self._metrics is not None:
                self._metrics.fetched(self._name, time.perf_counter() - began)

    def _admit(self, count: int) -> None:
        """
        Raises:
            Overloaded: no room for so many more, in the queue, or in memory, where each is taken to be as large as the
                largest one so far. Where nothing waits, any number may.
        """
        if self.waiting and self.waiting + count > self._config.vision_queue:
            raise Overloaded("too many images wait to be encoded (--vision-queue); try again later")
        coming = (len(self._jobs) + self._places + count) * self._largest
        if (self.held or self._jobs) and self.held + coming > self._config.vision_memory:
            raise Overloaded("the images of running requests fill their memory (--vision-memory); try again later")

    def _join(
        self, call: _Call, files: list[Media], keys: list[_Key], alone: bool
    ) -> tuple[list[EncodedImage | _Job], list[str]]:
        """For each image what is in the cache, else the job that makes it, old or new; and the outcomes to count."""
        new = {key: image for key, image in zip(keys, files) if key not in self._cache and key not in self._jobs}
        if len(new) > call.places:
            self._admit(len(new) - call.places)
        self._places -= call.places
        call.places = 0
        found: list[EncodedImage | _Job] = []
        outcomes = []
        for key, image in zip(keys, files):
            if key in self._cache:
                self._cache.move_to_end(key)
                found.append(self._cache[key])
                outcomes.append("cached")
                continue
            job = self._jobs.get(key)
            outcomes.append("encoded" if job is None else "shared")
            if job is None:
                job = _Job(key, image, alone, asyncio.get_running_loop().create_future())
                self._jobs[key] = job
                self._queue.append(job)
            job.waiters += 1
            call.jobs.append(job)
            found.append(job)
        self._dispatch()
        return found, outcomes

    def _leave(self, call: _Call) -> None:
        """Gives back what a call still holds. A job that nobody waits for any more is dropped, unless it is the one
        that the worker is at: nothing would be gained."""
        self._places -= call.places
        for job in call.jobs:
            job.waiters -= 1
            if job.waiters or job.done.done() or (self._encoding and job is self._encoding[0]):
                continue
            del self._jobs[job.key]
            job.done.cancel()
            if job.task is None:
                self._queue.remove(job)
            else:
                job.task.cancel()

    def _dispatch(self) -> None:
        """Gives the encoder what it may have."""
        while self._queue and len(self._encoding) < AHEAD and not self._closed:
            job = self._queue.popleft()
            self._encoding.append(job)
            job.task = asyncio.ensure_future(self._encode(job))
            job.task.add_done_callback(partial(self._end, job))  # also if it is cancelled before it begins

    def _end(self, job: _Job, _: asyncio.Task[None]) -> None:
        self._encoding.remove(job)
        self._dispatch()

    async def _encode(self, job: _Job) -> None:
        began = time.perf_counter()
        try:
            encoded = await self._encoder.encode(job.image, job.alone, LONGEST)
        except InflightError as error:
            self._settle(job, error)
        except Exception as error:  # the loop's guard: a fault of the encoder must not stop those who come after
            log.exception("encoding an image failed")
            self._settle(job, ModelError(describe(error)))
        else:
            now = time.perf_counter()
            if self._metrics is not None:
                self._metrics.encoded(self._name, now - max(began, self._ended))
            self._ended = now
            image = EncodedImage(job.key.digest, encoded.grid, encoded.rows, encoded.added)
            self._watch(image)
            self._settle(job, image)

    def _watch(self, image: EncodedImage) -> None:
        """Counts an image's bytes as long as somebody holds it."""
        size = _size(image)
        self._alive += size
        self._largest = max(self._largest, size)
        weakref.finalize(image.rows, self._let_go, size).atexit = False

    def _let_go(self, size: int) -> None:
        self._alive -= size

    def _settle(self, job: _Job, result: EncodedImage | InflightError) -> None:
        """Tells all who wait, and keeps an image for those who come."""
        if job.done.done():
            return
        del self._jobs[job.key]
        if isinstance(result, InflightError):
            job.done.set_exception(result)
            job.done.exception()  # nobody may be there to hear it
            return
        job.done.set_result(result)
        if self._closed:
            return
        self._gone.pop(job.key, None)
        self._cache[job.key] = result
        self._kept += _size(result)
        while self._kept > self._config.media_cache_memory:
            key, oldest = self._cache.popitem(last=_size(result) > self._config.media_cache_memory)
            self._kept -= _size(oldest)
            self._gone[key] = oldest.grid
            if len(self._gone) > GONE:
                self._gone.popitem(last=False)

    def _count(self, outcomes: list[str], tokens: int = 0) -> None:
        if self._metrics is not None:
            for outcome, count in Counter(outcomes).items():
                self._metrics.count(self._name, outcome, count)
            self._metrics.got(self._name, tokens)


async def _result(job: _Job) -> EncodedImage:
    """Waits for a job without owning it: cancelling the caller leaves the job as it is."""
    await asyncio.wait([job.done])
    _raise_of(job.done)
    return job.done.result()


def _raise_of(future: asyncio.Future[Any]) -> None:
    """Raises a copy of the future's error: it is raised in several calls, each of which adds its own traceback."""
    if future.cancelled():
        raise Unavailable(STOPS)
    error = future.exception()
    if error is not None:
        raise copy(error)


def _retrieve(task: asyncio.Task[bytes]) -> None:
    """The error of a fetch that nobody waits for any more is nobody's business."""
    if not task.cancelled():
        task.exception()


def _size(image: EncodedImage) -> int:
    return image.rows.nbytes + sum(rows.nbytes for rows in image.added)


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return error.image_outcome if isinstance(error, InflightError) else "failed"


@contextmanager
def _numbered(number: int, total: int) -> Iterator[None]:
    """Says which of several images an error is about."""
    try:
        yield
    except InvalidRequest as error:
        if total == 1:
            raise
        raise type(error)(f"{error} (image {number} of {total})") from None
