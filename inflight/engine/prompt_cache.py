"""The part of a replica's prefix cache that lies in files: what is read for a request before it is scheduled, and what
is written behind the steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from inflight.contract import Page, ShardOffer, Transfer, Transferred
from inflight.engine.executor import Executor
from inflight.metrics import PromptCacheCounts
from inflight.pages import PAGE, Found, PageFiles, Piece, look, page_blocks
from inflight.sched import Keeper, Scheduler, Sequence
from inflight.startup import aside

log = logging.getLogger("inflight")

LOOK_TIMEOUT, BLIND = 2.0, 60.0
"""Seconds that a request waits for the folder to be looked through, and for which none looks after that."""
FIRST_WAIT, MOST_WAIT = 10.0, 60.0
"""Seconds that a request waits for its pages, until it is known how long computing them takes, and at most."""
LEAST_WAIT = 1.0
FEW = 64
"""Tokens of a step below which it says nothing about the speed of prompts."""
FORGET = 1.1
"""Factor by which reading counts as faster each time it was not tried."""


@dataclass
class _Load:
    """Pages on their way into the cache.

    Attributes:
        blocks: taken for them, with the digests of what comes there.
        slot: taken for the state, and the digest of its prefix.
        gain: tokens that a request finds once all are there.
        done: set to the tokens that are there.
    """

    pages: list[Page]
    blocks: list[list[tuple[int, bytes]]]
    slot: tuple[int, bytes] | None
    gain: int
    done: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Speeds:
    """Of reading and of computing prompts, so that a prompt is only read where that is faster."""

    def __init__(self) -> None:
        self._computed = self._read = 0.0  # tokens and bytes a second; 0: not known

    def computed(self, tokens: int, seconds: float) -> None:
        if tokens >= FEW and seconds > 0:
            self._computed = _mean(self._computed, tokens / seconds)

    def read(self, size: int, seconds: float) -> None:
        if size and seconds > 0:
            self._read = _mean(self._read, size / seconds)

    def worth(self, tokens: int, size: int) -> bool:
        """Whether reading `size` bytes takes less time than computing `tokens`."""
        if not self._computed or not self._read or size / self._read < tokens / self._computed:
            return True
        self._read *= FORGET
        return False

    def patience(self, tokens: int) -> float:
        """Seconds to wait for so many tokens."""
        wait = tokens / self._computed if self._computed else FIRST_WAIT
        return min(max(wait, LEAST_WAIT), MOST_WAIT)


class PromptCache:
    """Stands between those who bring requests and a scheduler. Without a folder it does nothing.

    Requests whose prompt goes on in files for a page at least wait until it is read, or until it takes longer than
    computing it. Reading fills blocks of the pool and publishes them, so all else is the scheduler's: admission, hits,
    what is evicted.

    Args:
        folder: of `--prompt-cache`; None: there is none.
        wake: called when there is something to plan.
    """

    def __init__(
        self,
        folder: Path | None,
        scheduler: Scheduler,
        executor: Executor,
        counts: PromptCacheCounts,
        wake: Callable[[], None],
    ) -> None:
        self._folder, self._scheduler, self._executor = folder, scheduler, executor
        self._counts, self._wake = counts, wake
        self._files: PageFiles | None = None
        self._keeper: Keeper | None = None
        self._numbers = count()
        self._speeds = _Speeds()
        self._waiting: dict[int, tuple[Sequence, asyncio.Task[None]]] = {}
        self._loads: dict[int, _Load] = {}
        self._stores: dict[int, list[Page]] = {}
        self._turn = asyncio.Lock()
        self._blind_until = 0.0
        if folder is not None:
            executor.on_transferred = self._transferred

    def opened(self, offer: ShardOffer) -> None:
        """Takes the folder of ranks that were started."""
        self._files = None
        if self._folder is not None and offer.prompt_cache:
            self._files = PageFiles(self._folder, offer.prompt_cache)
            self._block_bytes = offer.cache.bytes / max(1, offer.cache.num_blocks)
            self._state_bytes = offer.states.bytes
            self._keeper = self._keeper or Keeper(self._scheduler)

    @property
    def waiting(self) -> int:
        """Requests that wait for files."""
        return len(self._waiting)

    # The home of requests

    def add(self, sequence: Sequence) -> None:
        """Gives a new request to the scheduler, once what files have of its prompt is read."""
        blind = self._blind_until and time.monotonic() < self._blind_until
        if self._files is None or self._executor.lost or blind or not self._may(sequence):
            self._scheduler.add(sequence)
            return
        task = asyncio.ensure_future(self._read(self._files, sequence))
        self._waiting[sequence.id] = sequence, task

    def finish(self, id: int) -> None:
        """The request's caller has left."""
        left = self._waiting.pop(id, None)
        if left is not None:
            left[0].finished = True

    def lost(self) -> None:
        """The shards are lost, and what they held: nobody waits for files any more. Before `Scheduler.lost`."""
        for load in self._loads.values():
            if not load.done.done():
                load.done.set_result(0)
        self._loads.clear()
        self._stores.clear()
        for sequence, _ in list(self._waiting.values()):
            self._admit(sequence)
        if self._keeper is not None:
            self._keeper.reset()

    def flush(self) -> None:
        """Sends what is still to be written to the ranks, which will end."""
        if self._keeper is not None:
            for _ in range(2):
                self._keeper.planned()
            self._store(self._keeper, last=True)

    async def close(self) -> None:
        """Behind a `flush` gives the scheduler the requests that wait, and until `opened` all that come."""
        self.flush()
        self._files = None
        tasks = [task for _, task in self._waiting.values()]
        for sequence, _ in list(self._waiting.values()):
            self._admit(sequence)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The step loop's side

    def planned(self) -> None:
        """To be called behind each plan that was sent, and where there was none: sends what is to be written."""
        if self._keeper is not None:
            self._keeper.planned()
            self._store(self._keeper)

    def computed(self, tokens: int, seconds: float) -> None:
        """Notes how long a step took that computed so many tokens of prompts."""
        self._speeds.computed(tokens, seconds)

    def _store(self, keeper: Keeper, last: bool = False) -> None:
        if keeper.idle or self._files is None or self._executor.lost:
            return
        pages = keeper.pages(last)
        if pages:
            number = next(self._numbers)
            self._stores[number] = pages
            self._executor.transfer(Transfer(number, False, pages))
        self._counts.dropped = keeper.dropped

    # Reading

    def _may(self, sequence: Sequence) -> bool:
        """Whether files may have a page more of its prompt than the cache."""
        if not sequence.lasting or sequence.sampling.needs_whole_prompt:
            return False
        return len(sequence.tokens) - 1 - self._scheduler.found(sequence) >= PAGE

    async def _read(self, files: PageFiles, sequence: Sequence) -> None:
        """Reads what files have of a request's prompt, then gives the request to the scheduler."""
        try:
            capacity = self._scheduler.capacity
            size = page_blocks(capacity.block_size)
            digests = sequence.chain(capacity.block_size)[: (len(sequence.tokens) - 1) // capacity.block_size]
            search = partial(look, files, digests, size, bool(capacity.states))
            found = await asyncio.wait_for(aside(search, "page-look"), LOOK_TIMEOUT)
            self._known(sequence, digests, found)
            if self._gain(sequence, found) >= PAGE:
                async with self._turn:
                    await self._load(files, sequence, digests, found)
            else:
                self._counts.missed += 1
        except asyncio.TimeoutError:
            self._blind_until = time.monotonic() + BLIND
            log.warning("the folder of the prompt cache does not answer for %g seconds", LOOK_TIMEOUT)
        except Exception:
            log.exception("a prompt is computed, because its part in files cannot be read")
        finally:
            self._admit(sequence)

    def _admit(self, sequence: Sequence) -> None:
        if self._waiting.pop(sequence.id, None) is not None and not sequence.finished:
            self._scheduler.add(sequence)
            self._wake()

    def _known(self, sequence: Sequence, digests: list[bytes], found: Found) -> None:
        """Notes which files there are, and that those of what neither files nor the cache have are gone."""
        if self._keeper is not None:
            for piece in found.pieces:
                self._keeper.found(piece.key)
            cached = self._scheduler.found(sequence) // self._scheduler.capacity.block_size
            self._keeper.gone(digests[max(found.blocks, cached) :])

    def _gain(self, sequence: Sequence, found: Found) -> int:
        """Tokens that files have beyond the cache."""
        return found.blocks * self._scheduler.capacity.block_size - self._scheduler.found(sequence)

    async def _load(self, files: PageFiles, sequence: Sequence, digests: list[bytes], found: Found) -> None:
        """Reads pages into blocks, if it is still worth it: another request may have read them. It is not where nobody
        waits any more, after a loss of the shards too, nor while a read is overdue."""
        gain = self._gain(sequence, found)
        if files is not self._files or sequence.id not in self._waiting or gain < PAGE:
            return
        if self._loads:
            self._counts.passed += 1
            return
        size = gain / self._scheduler.capacity.block_size * self._block_bytes + self._state_bytes * found.state
        if not self._speeds.worth(gain, int(size)):
            self._counts.passed += 1
            return
        load = self._begin(digests, found, gain)
        if load is None:
            self._counts.passed += 1
            return
        number, began = next(self._numbers), time.perf_counter()
        self._loads[number] = load
        self._executor.transfer(Transfer(number, True, load.pages))
        try:
            tokens = await asyncio.wait_for(asyncio.shield(load.done), self._speeds.patience(gain))
        except asyncio.TimeoutError:
            self._counts.late += 1
            return
        self._counts.waited += time.perf_counter() - began
        if tokens:
            self._counts.hits += 1
            self._counts.tokens += tokens
        else:
            self._counts.missed += 1

    def _begin(self, digests: list[bytes], found: Found, gain: int) -> _Load | None:
        """Takes blocks, and a slot for the state; None: there are none."""
        pool, states = self._scheduler.pool, self._scheduler.states.pool
        digests = digests[: found.blocks]
        present = pool.find(digests)
        pool.share(present)  # they must not be evicted for what comes behind them
        try:
            missing = len(digests) - len(present)
            # Rows that run need their next blocks meanwhile: none should be preempted for files.
            taken = pool.take(missing) if missing + self._scheduler.running <= pool.free else None
        finally:
            pool.release(present)
        if taken is None:
            return None
        slot: tuple[int, bytes] | None = None
        if found.state and digests[-1] not in states:
            free = states.take()
            if free is None:
                pool.release(taken)
                return None
            slot = free, digests[-1]
        numbers = [-1] * len(present) + taken
        pages, blocks = [], []
        for place, piece in enumerate(found.pieces):
            wanted = numbers[piece.first : piece.stop]
            wanted += [-1] * (piece.stop - piece.first - len(wanted))  # the prefix ends within the page
            if max(wanted) < 0:
                continue
            pages.append(Page(piece.key, wanted, place=place))
            blocks.append(_named(piece, wanted, digests))
        if slot is not None:
            pages.append(Page(slot[1], state=slot[0], place=len(found.pieces)))
        return _Load(pages, blocks, slot, gain)

    def _transferred(self, answer: Transferred) -> None:
        """An order is done. Those of ranks that were lost are forgotten."""
        stored = self._stores.pop(answer.number, None)
        if stored is not None and self._keeper is not None:
            self._keeper.written(stored, answer.done)
            self._counts.written += answer.bytes
            self._counts.unwritten += len(stored) - answer.done
            self._store(self._keeper)
            self._wake()  # a request may wait for what was held
        load = self._loads.pop(answer.number, None)
        if load is not None:
            self._counts.read += answer.bytes
            self._counts.reading += answer.seconds
            self._speeds.read(answer.bytes, answer.seconds)
            self._publish(load, answer.done)
            self._wake()

    def _publish(self, load: _Load, done: int) -> None:
        """Lets requests find what was read."""
        pool, states = self._scheduler.pool, self._scheduler.states.pool
        count, whole = 0, done == len(load.pages)
        for index, blocks in enumerate(load.blocks):
            for number, digest in blocks if index < done else ():
                pool.publish(number, digest)
                count += 1
        if load.slot is not None:
            slot, digest = load.slot
            if whole:
                states.publish(slot, digest)
            else:
                states.release(slot)
        pool.release([number for blocks in load.blocks for number, _ in blocks])
        for page in load.pages[done:]:
            if self._keeper is not None:  # so that they are written again
                self._keeper.missed(page.key, page.state >= 0)
        if not load.done.done():
            # Behind a prefix without its state all is computed anew; with it nothing is, though its blocks were there.
            partial = 0 if load.slot is not None else count * self._scheduler.capacity.block_size
            load.done.set_result(load.gain if whole else partial)


def _named(piece: Piece, numbers: Items[int], digests: Items[bytes]) -> list[tuple[int, bytes]]:
    """The blocks of a page that are read, with their digests."""
    return [(number, digests[piece.first + index]) for index, number in enumerate(numbers) if number >= 0]


def _mean(before: float, now: float) -> float:
    return now if not before else before + (now - before) / 4
