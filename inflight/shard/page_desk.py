"""Copies between a rank's cache and files, on threads of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from inflight.checkpoint import ModelFolder, adapter_digest
from inflight.contract import Array, Page, ShardJob, Transfer, Transferred
from inflight.errors import InflightError, StartError
from inflight.kernels import checksum
from inflight.models import KeptForms
from inflight.pages import HEADER, PageFiles, page_blocks
from inflight.shard.fingerprint import fingerprint, weights_digest

log = logging.getLogger("inflight")

NICE = 10
"""Added to the niceness of the thread that writes, on Linux: steps come first."""
PAUSE = 60.0
"""Seconds without writing after a file could not be written, and between two lines of the log about files."""

Answer = Callable[[Transferred], None]
_Order = tuple[Transfer, Answer]


class PageDesk:
    """Two threads: one writes, one reads. Each does one order after the other.

    Args:
        files: of this rank.
        kept: copies the model's blocks and states.
        size: blocks of a page.
    """

    def __init__(self, files: PageFiles, kept: KeptForms, size: int) -> None:
        self._files, self._kept, self._size = files, kept, size
        self._silent_until = 0.0  # nothing is written
        self._told_until = 0.0  # nothing is logged
        self._reading: SimpleQueue[_Order | None] = SimpleQueue()
        self._writing: SimpleQueue[_Order | None] = SimpleQueue()
        self._memories = {True: self._memory(), False: self._memory()}  # one for each thread
        self._threads = [
            threading.Thread(target=self._work, args=(queue, nice), name=name, daemon=True)
            for queue, nice, name in ((self._reading, 0, "page-reader"), (self._writing, NICE, "page-writer"))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, order: Transfer, answer: Answer) -> None:
        """Begins an order. Args: answer: called on a thread of its own when it is done."""
        (self._reading if order.load else self._writing).put((order, answer))

    def close(self, seconds: float) -> None:
        """Ends the threads behind what they have to do, or leaves them to it after `seconds`."""
        self._reading.put(None)
        self._writing.put(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _memory(self) -> Array:
        most = max(self._size * self._kept.block_bytes, self._kept.state_bytes)
        return np.empty(HEADER + most, np.uint8)

    def _work(self, queue: SimpleQueue[_Order | None], nice: int) -> None:
        if nice and sys.platform == "linux":  # elsewhere the whole process would be nicer
            _be_nice(nice)
        while (item := queue.get()) is not None:
            order, answer = item
            began, done, moved = time.perf_counter(), 0, 0
            for page in order.pages:
                count = self._guarded(order.load, page)
                if count is None:
                    break
                done, moved = done + 1, moved + count
            answer(Transferred(order.number, done, moved, time.perf_counter() - began))

    def _guarded(self, load: bool, page: Page) -> int | None:
        """The bytes that were moved; None: none could be. Whatever goes wrong with a file is not the model's fault."""
        try:
            return self._load(page) if load else self._store(page)
        except Exception as error:  # an order without an answer would hold its blocks for ever
            now = time.monotonic()
            if now >= self._told_until:
                log.warning("the prompt cache cannot be used for now: %s", error)
                self._told_until = now + PAUSE
            if not load:
                self._silent_until = now + PAUSE
            return None

    def _store(self, page: Page) -> int | None:
        if time.monotonic() < self._silent_until:
            return None
        memory = self._memories[False]
        content = memory[HEADER : HEADER + self._bytes(page)]
        if page.state >= 0:
            self._kept.read_state(page.state, content)
        else:
            for block, part in self._parts(page, content):
                self._kept.read_block(block, part)
        return self._files.write(page.key, memory[: HEADER + len(content)], state=page.state >= 0, place=page.place)

    def _load(self, page: Page) -> int | None:
        memory = self._memories[True][: HEADER + self._bytes(page)]
        if not self._files.read(page.key, memory, state=page.state >= 0, place=page.place):
            return None
        content = memory[HEADER:]
        if page.state >= 0:
            self._kept.write_state(page.state, content)
            return len(content)
        for block, part in self._parts(page, content):
            if block >= 0:
                self._kept.write_block(block, part)
        return len(content)

    def _bytes(self, page: Page) -> int:
        return self._kept.state_bytes if page.state >= 0 else len(page.blocks) * self._kept.block_bytes

    def _parts(self, page: Page, content: Array) -> Iterator[tuple[int, Array]]:
        size = self._kept.block_bytes
        for index, block in enumerate(page.blocks):
            yield block, content[index * size : (index + 1) * size]


def _be_nice(more: int) -> None:
    """Adds to the niceness of this thread. Of a process that is nicer already nobody may take some away."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + more))


class Opening:
    """Makes the desk of a rank that loads. If the model's files change meanwhile, what others left must not be found.

    Args:
        folder: the model, before it is loaded.
    """

    def __init__(self, job: ShardJob, folder: ModelFolder) -> None:
        self._job, self._folder = job, folder
        self._before = self._digest()
        self._adapters = self._adapter_digests()

    def desk(self, kept: KeptForms | None, dtype: str) -> tuple[PageDesk | None, str]:
        """The desk and the name of its folder, once the model is loaded and has its cache; None and an empty name if
        there is none.

        Args:
            dtype: of the loaded weights.

        Raises:
            StartError: the folder cannot be used.
        """
        model = self._job.model
        if model.prompt_cache is None or self._before is None:
            return None, ""
        if kept is None:
            log.warning("--prompt-cache is not used: this model's cache cannot be kept in files")
            return None, ""
        if self._digest() != self._before:
            log.warning(
                "--prompt-cache is not used until the next start: the model's files changed while it was loaded"
            )
            return None, ""
        name = fingerprint(self._before, self._job, dtype, kept, self._folder)
        files = PageFiles(model.prompt_cache, name, model.prompt_cache_size, checksum)
        try:
            files.open()
        except OSError as error:
            raise StartError(f"--prompt-cache: the folder '{model.prompt_cache}' cannot be used: {error}") from None
        return PageDesk(files, kept, page_blocks(model.block_size)), name

    @property
    def contents(self) -> tuple[tuple[int, int], ...]:
        """`ShardOffer.contents`, once the model is loaded."""
        return tuple(
            (number, digest if digest == before else 0)
            for (number, before), (_, digest) in zip(self._adapters, self._adapter_digests(), strict=True)
        )

    def _adapter_digests(self) -> list[tuple[int, int]]:
        model = self._job.model
        if model.prompt_cache is None:
            return []
        return [(each.number or place, _readable(each.folder)) for place, each in enumerate(model.adapters, 1)]

    def _digest(self) -> bytes | None:
        if self._job.model.prompt_cache is None:
            return None
        try:
            return weights_digest(self._folder)
        except OSError:
            return None  # what is wrong with them is said by who loads them


def _readable(adapter: Path) -> int:
    """Its digest; 0: it cannot be read, which the loading says."""
    try:
        return adapter_digest(adapter)
    except (InflightError, OSError):
        return 0
