"""Which pages of the cache are written to files: those of prompts that were computed, and of answers behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from inflight.contract import Page
from inflight.pages import Piece, page_blocks, tail, whole_pages
from inflight.sched.scheduler import Scheduler
from inflight.sched.sequence import Sequence

IN_FLIGHT = 16
"""Pages that a rank may be told to write at once. Their blocks cannot be evicted meanwhile."""
WAITING = 4096
"""Pages that wait for their turn at most; they may be evicted. A million tokens."""
REMEMBERED = 1 << 17
"""Names of files that are taken to be there, at most."""


@dataclass(frozen=True)
class _Computed:
    """What a row has computed.

    Attributes:
        row: its id.
        digests: of its published blocks.
        junction: as in `Sequence`.
        whole: its prompt is computed, or it has left.
    """

    row: int
    digests: list[bytes]
    junction: int
    whole: bool


@dataclass(frozen=True)
class _Wanted:
    """A page, or with `state` the state behind it, that is to be written."""

    piece: Piece
    digests: list[bytes]
    state: bool


class Keeper:
    """Chooses pages, holds their blocks while they are written, and lets them go.

    Whole pages are always written. What is behind them is written only together with a new one, so that requests of a
    common beginning do not write a file each. Of recurrent states those at fixed places are written, and others
    together with a new page.

    Args:
        scheduler: of the replica; `Scheduler.on_computed` is set to `note`.

    Attributes:
        dropped: pages that were evicted, or of which too many waited.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._size = page_blocks(scheduler.capacity.block_size)
        self._new: list[_Computed] = []
        self._ready: list[_Computed] = []  # their last states are published
        self._wanted: deque[_Wanted] = deque()
        self._held = 0
        self._there: dict[tuple[bytes, bool], None] = {}
        self._missing: dict[tuple[bytes, bool], None] = {}  # files that could not be read
        self._fresh: dict[int, bool] = {}  # rows with new pages, whose tails are still to come
        self.dropped = 0
        scheduler.on_computed = self.note

    def reset(self) -> None:
        """Forgets everything, after a start of the shards."""
        self._new, self._ready, self._held = [], [], 0
        self._size = page_blocks(self._scheduler.capacity.block_size)
        self._wanted.clear()
        self._there.clear()
        self._missing.clear()
        self._fresh.clear()

    def note(self, row: Sequence, whole: bool) -> None:
        """Notes a row whose prompt a plan computes (`whole`: the last of it), or that leaves. Texts of which only a
        vector is wanted seldom come again."""
        if row.published >= self._size and row.lasting and not row.sampling.pooling:
            self._new.append(_Computed(row.id, row.digests[: row.published], row.junction, whole))

    def planned(self) -> None:
        """To be called behind each call of `Scheduler.plan`: the states of the plan before are published."""
        if self._ready:
            for computed in self._ready:
                self._choose(computed)
        self._ready, self._new = self._new, []

    @property
    def idle(self) -> bool:
        """Whether nothing is to be written."""
        return not self._wanted

    def pages(self, last: bool = False) -> list[Page]:
        """The pages to write now. They are held until `written`. Args: last: nothing will be computed any more."""
        room = max(1, min(IN_FLIGHT, self._scheduler.capacity.num_blocks // (4 * self._size)))
        room = WAITING if last else room
        found: list[Page] = []
        while self._wanted and self._held < room:
            page = self._hold(self._wanted.popleft())
            if page is not None:
                found.append(page)
                self._held += 1
        return found

    def written(self, pages: Items[Page], done: int) -> None:
        """Lets pages go. Args: done: how many of them, from the first on, are in files."""
        for index, page in enumerate(pages):
            if page.state >= 0:
                self._scheduler.states.pool.let_go(page.state)
            else:
                self._scheduler.pool.release(page.blocks)
            self._held -= 1
            if index >= done:
                self._there.pop((page.key, page.state >= 0), None)

    def found(self, key: bytes, state: bool = False) -> None:
        """Notes that there is such a file."""
        while len(self._there) >= REMEMBERED:
            self._there.pop(next(iter(self._there)))
        self._there[key, state] = None

    def gone(self, keys: Items[bytes]) -> None:
        """Notes that there are no such files: others delete them too. What is computed anew is written again."""
        for key in keys:
            self._there.pop((key, False), None)
            self._there.pop((key, True), None)

    def missed(self, key: bytes, state: bool = False) -> None:
        """Notes that a file could not be read: it will be written again."""
        self._there.pop((key, state), None)
        if len(self._missing) < WAITING:
            self._missing[key, state] = None

    def _choose(self, computed: _Computed) -> None:
        digests = computed.digests
        new = [piece for piece in whole_pages(digests, self._size) if (piece.key, False) not in self._there]
        for piece in new:
            self._want(_Wanted(piece, digests, False))
        if new and not computed.whole:
            self._fresh[computed.row] = True
        fresh = computed.whole and (self._fresh.pop(computed.row, False) or bool(new))
        if self._scheduler.capacity.states:
            self._choose_states(computed, fresh)
        elif computed.whole and len(digests) % self._size:
            piece = tail(digests, len(digests), self._size)
            if fresh or (piece.key, False) in self._missing:
                self._want(_Wanted(piece, digests, False))

    def _choose_states(self, computed: _Computed, all: bool) -> None:
        """Chooses the states behind a row's prefixes, each with the page that ends there. Args: all: not only those at
        fixed places."""
        capacity, saved, digests = self._scheduler.capacity, self._scheduler.states.pool, computed.digests
        for stop in range(self._size, len(digests) + 1):
            key, place = digests[stop - 1], stop * capacity.block_size
            if key not in saved:
                continue
            missing = (key, False) in self._missing or (key, True) in self._missing
            if all or missing or not place % capacity.align or place == computed.junction:
                piece = tail(digests, stop, self._size)
                self._want(_Wanted(piece, digests, False))
                self._want(_Wanted(piece, digests, True))

    def _want(self, wanted: _Wanted) -> None:
        name = wanted.piece.key, wanted.state
        if name in self._there:
            return
        if len(self._wanted) >= WAITING:
            self._drop(self._wanted.popleft())
        self._missing.pop(name, None)
        self.found(*name)
        self._wanted.append(wanted)

    def _drop(self, wanted: _Wanted) -> None:
        self.dropped += 1
        self._there.pop((wanted.piece.key, wanted.state), None)

    def _hold(self, wanted: _Wanted) -> Page | None:
        """The page with its blocks, or its state's slot, held; None: it was evicted."""
        key, first, stop = wanted.piece
        place = first // self._size
        if wanted.state:
            slot = self._scheduler.states.pool.hold(key)
            if slot is not None:
                return Page(key, state=slot, place=place)
        else:
            blocks = self._scheduler.pool.find(wanted.digests[first:stop])
            if len(blocks) == stop - first:
                self._scheduler.pool.share(blocks)
                return Page(key, blocks, place=place)
        self._drop(wanted)
        return None
