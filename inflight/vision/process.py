"""The server's end of a vision worker: a process that decodes images and runs the tower."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from inflight.config import GeneratorConfig, ServerConfig
from inflight.contract import Grid, ImageInput, Media
from inflight.errors import DeadlineExceeded, InflightError, InvalidRequest, StartError, Unavailable, error_from_wire
from inflight.link import (
    AnyMessage,
    Drop,
    EncodeImage,
    Failed,
    ImageEncoded,
    ImageFailed,
    Leaving,
    LoadVision,
    Packer,
    Unpacker,
    VisionReady,
    create_file,
)
from inflight.place import STOP_GRACE, Launch, WorkerHandle, start_worker
from inflight.startup import KILLED_STARTS, killed_too_often
from inflight.vision.encoder import Encoded
from inflight.vision.families import Family

log = logging.getLogger("inflight")

AHEAD = 2
"""Images that the worker has at most: it prepares the second while the tower computes the first."""
PROOF = 2.0
"""Deaths of the worker after which the image that it computed alone is given up; a kill from outside counts half."""
FAILED_STARTS = 3
"""Restarts in a row that fail with the worker's own text, after which those who wait get it; restarts go on."""
CANNOT = "the image cannot be decoded"


@dataclass(eq=False)
class _Job:
    """Attributes:
    deaths: of workers that had it.
    sent: the worker has it.
    """

    number: int
    image: Media
    alone: bool
    result: asyncio.Future[Encoded]
    deaths: float = 0.0
    sent: bool = False


@dataclass(eq=False)
class _Worker:
    """One life of the process."""

    handle: WorkerHandle
    ready: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    failure: str | None = None
    left: bool = False
    answered: bool = False

    def fail(self, error: StartError) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # a start that was given up does not take it


class VisionProcess:
    """An `Encoder` (`inflight.vision.encoder`) with a process of its own.

    When the process dies it is started again, and the images that it had run alone; one that ends it twice is refused.

    Args:
        config: the model.
        server: has the start timeout, the rule of restarts and the directory of logs.
        family: of the model.
        identity: of checkpoint and settings.
    """

    def __init__(self, config: GeneratorConfig, server: ServerConfig, family: Family, identity: str) -> None:
        self._config = config
        self._server = server
        self._family = family
        self._identity = identity
        self._computed_by = ""
        self._worker: _Worker | None = None
        self._jobs: deque[_Job] = deque()  # in order; those that were sent first
        self._number = 0
        self._starts = 0
        self._file: int | None = None
        self._restart: asyncio.Task[None] | None = None
        self._up = False
        self._stopped = False
        self._failing: str | None = None

    @property
    def identity(self) -> str:
        """Whole once it has started."""
        return f"{self._identity} {self._computed_by}"

    @property
    def input(self) -> ImageInput:
        return self._family

    @property
    def alone_matters(self) -> bool:
        return self._family.alone_matters

    @property
    def pids(self) -> list[int]:
        worker = self._worker
        return [worker.handle.pid] if worker is not None and worker.handle.running else []

    async def start(self) -> None:
        failed = StartError("the server stops")
        for _ in range(KILLED_STARTS):
            if self._stopped:
                raise failed
            try:
                await self._begin()
                return
            except _Killed as error:
                failed = StartError(str(error))
                await asyncio.sleep(self._server.restart.first_delay)
        raise killed_too_often(failed)

    async def encode(self, image: Media, alone: bool = True, timeout: float | None = None) -> Encoded:
        if self._stopped:
            raise Unavailable("the server stops")
        if self._failing is not None:
            raise Unavailable(f"images cannot be read now: {self._failing}")
        self._number += 1
        job = _Job(self._number, image, alone, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._send()
        try:
            await asyncio.wait([job.result], timeout=timeout)
            if job.result.done():
                return job.result.result()
            if job.sent:  # a library may hang in it
                log.warning("an image took the vision worker of '%s' too long: it is ended", self._config.name)
                self.kill()
            raise DeadlineExceeded(f"the image was not encoded within {timeout:g} seconds")
        finally:
            self._forget(job)

    async def stop(self) -> None:
        self._stopped = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait([self._restart])
        self._fail_all("the server stops")
        if self._worker is not None:
            await self._worker.handle.end(STOP_GRACE)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def kill(self) -> None:
        if self._worker is not None:
            self._worker.handle.kill()

    # The process

    async def _begin(self) -> None:
        """Starts the process and waits until it has loaded.

        Raises:
            StartError: with its own text.
            _Killed: it was killed while it loaded.
        """
        if self._file is None:
            self._file = create_file("inflight-unused", 4096)
        name, log_dir = self._config.name, self._server.log_dir
        launch = Launch(
            label=("--vision", f"--servable_name={name}", "--device_id=vision"),
            inbox=self._file,
            outbox=self._file,
            environment={},
            log=None if log_dir is None else log_dir.absolute() / f"log_{name}_vision.log",
            append=self._starts > 0,
        )
        handle = WorkerHandle(f"the vision worker of '{name}'", start_worker(launch), self._received, self._ended)
        self._worker = worker = _Worker(handle)
        self._starts += 1
        loaded = False
        try:
            await handle.connect()
            handle.send(LoadVision(self._config))
            self._computed_by = await asyncio.wait_for(worker.ready, self._server.start_timeout)
            self._up = loaded = True
        except asyncio.TimeoutError:
            raise StartError(
                f"the vision worker was not loaded within {self._server.start_timeout:g} seconds; raise "
                "--start-timeout where that may take so long"
            ) from None
        finally:
            if not loaded:
                await handle.end(0)
        self._send()

    def _received(self, message: AnyMessage, values: Unpacker) -> None:
        worker = self._worker
        assert worker is not None
        if isinstance(message, (ImageEncoded, ImageFailed)):
            worker.answered = True
            job = next((job for job in self._jobs if job.number == message.number), None)
            if job is not None:
                self._jobs.remove(job)
                _settle(job, _result(message, values))
            self._send()
        elif isinstance(message, VisionReady):
            if not worker.ready.done():
                worker.ready.set_result(message.identity)
        elif isinstance(message, Failed):
            worker.failure = message.text
            worker.fail(StartError(message.text))
        elif isinstance(message, Leaving):
            worker.left = True

    def _ended(self, handle: WorkerHandle) -> None:
        worker = self._worker
        assert worker is not None
        outside = handle.killed or worker.left
        text = worker.failure or f"the vision worker ended with status {handle.status}"
        worker.fail(_Killed(text) if outside and worker.failure is None else StartError(text))
        if not self._up:
            return
        self._up = False
        self._blame(0.5 if outside else 1.0)
        if not self._stopped:
            log.warning("%s; it is started again", text)
            self._restart = asyncio.ensure_future(self._replace(0.0 if worker.answered else None))

    async def _replace(self, delay: float | None) -> None:
        """Starts the process until it is loaded. Args: delay: in front of the first start; None: the policy's."""
        policy = self._server.restart
        back_off = policy.first_delay if delay is None else delay
        refusals = 0
        while True:
            await asyncio.sleep(back_off)
            back_off = policy.after(back_off)
            try:
                await self._begin()
            except _Killed as error:
                log.warning("%s", error)
            except (InflightError, OSError) as error:
                refusals += 1
                log.error("the vision worker of '%s' cannot start: %s", self._config.name, error)
                if refusals >= FAILED_STARTS:
                    self._failing = str(error)
                    self._fail_all(f"images cannot be read now: {error}")
            else:
                self._failing = None
                return

    # Jobs

    def _send(self) -> None:
        """Gives the worker what it may have: images that it died with one at a time."""
        if not self._up or self._worker is None:
            return
        sent = [job for job in self._jobs if job.sent]
        for job in self._jobs:
            if job.sent:
                continue
            if len(sent) >= AHEAD or (sent and (job.deaths or sent[-1].deaths)):
                return
            packer = Packer()
            image = job.image
            value = packer.value(image.data if image.pixels is None else np.ascontiguousarray(image.pixels))
            assert not isinstance(value, str)
            self._worker.handle.send(EncodeImage(job.number, value, image.detail, job.alone), packer)
            job.sent = True
            sent.append(job)

    def _blame(self, part: float) -> None:
        """Takes back what a dead worker had. Args: part: how far the death speaks against an image."""
        had = [job for job in self._jobs if job.sent]
        for job in had:
            job.sent = False
            job.deaths += part
            if job.deaths >= PROOF and len(had) == 1:
                self._jobs.remove(job)
                _settle(job, InvalidRequest(CANNOT))

    def _forget(self, job: _Job) -> None:
        """Takes a job away whose caller waits no more."""
        if job in self._jobs:
            self._jobs.remove(job)
            if job.sent and self._up and self._worker is not None:
                self._worker.handle.send(Drop([job.number]))
            self._send()

    def _fail_all(self, why: str) -> None:
        while self._jobs:
            _settle(self._jobs.popleft(), Unavailable(why))


class _Killed(StartError):
    """The process was killed from outside while it loaded, which says little about the model."""


def _settle(job: _Job, result: Encoded | InflightError) -> None:
    if job.result.done():
        return
    if isinstance(result, InflightError):
        job.result.set_exception(result)
        job.result.exception()  # its caller may have left
    else:
        job.result.set_result(result)


def _result(message: ImageEncoded | ImageFailed, values: Unpacker) -> Encoded | InflightError:
    if isinstance(message, ImageFailed):
        return error_from_wire(message.kind, message.text)
    rows, *added = values.row(message.rows)
    assert isinstance(rows, np.ndarray)
    return Encoded(Grid(*message.grid), rows, tuple(each for each in added if isinstance(each, np.ndarray)))
