"""A request in the scheduler. Its progress is three counts instead of a phase."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence as Tokens
from operator import attrgetter

import numpy as np

from inflight.contract import Array, EncodedImage, MediaRows, Sampling, SeenImage, Span
from inflight.sched.blocks import chain, root
from inflight.sched.speculation import DraftRecord, Experience

CRASHED, KILLED, SUSPECT, PROOF = 2, 1, 4, 6
"""Blame of a row. A loss of the shards adds `CRASHED` or `KILLED` to each row that they computed; the row's next token
clears it. At `SUSPECT`, after two crashes, a row runs alone; a third one, `PROOF`, makes it guilty. A kill from outside
counts less, because anything may cause it, but the system also kills when memory is short: after four kills a row runs
alone, and the sixth is proof."""

STOP = attrgetter("stop")

BY_CONTENT = 1 << 62
"""Numbers of adapters from this one on are made of what their files hold (`inflight/engine/adapters.py`)."""


class Sequence:
    """A request that has a row in the batch or waits for one.

    Its progress is three counts: `len(tokens)` tokens are *known*; the keys and values of the first `planned` tokens
    are computed by plans that were sent; `pending` further tokens are sampled by plans that are not answered yet. In
    these it may guess up to `spread` more, which become known, and count as planned, if they are right.

    Attributes:
        tokens: prompt and answered tokens.
        num_prompt: number of prompt tokens.
        stop_at: number of known tokens at which it ends.
        lockstep: it follows a grammar, so a step needs its last token on the host, and then `mask`.
        lockstep_at: with `lockstep`, only from this number of known tokens on.
        mask: the tokens that may come next, if `lockstep`; None while they are not known, empty where all may.
        draft: likely next tokens, with the mask behind each, if `lockstep`. Other rows guess for themselves.
        forced: number of the first of them that its grammar forces.
        adapter: number of its LoRA adapter; 0: none.
        content: a number made of what the adapter's files hold; 0: it is not known.
        spans: runs of prompt tokens whose embeddings come from images, by position.
        images: of the spans. The scheduler drops them when the request is finished. The keys of those without rows are
            believed to be in the prefix cache (`Scheduler.restore`).
        blocks: its block table.
        turned: the variant of rotary embedding that its keys were computed with (`sched/cache.py`).
        own: tokens that were not in the prefix cache when it was given to this scheduler (`sched/routing.py`).
        cached: number of prompt tokens found in the prefix cache at its first admission.
        state: slot of its recurrent state; None: it has no row, or the model no such state.
        restore: slot of the saved state that it begins with at its admission.
        junction: number of leading tokens whose blocks were in the prefix cache at its admission, though no state was
            saved behind them; 0: none. It will be saved there, for the next one with this prefix.
        trail: a position of decoding and the slot to which the state behind it is copied; None: there is none that is
            not published.
        trailed: digest of the last state that was saved while it decoded.
        running: it has a row.
        queued: it waits for a row. Neither `running` nor `queued`: it left for its last token, or is finished.
        finished: its request has ended.
        blame: sum of its blame for losses of the shards since its last token.
        lost_at: number of known tokens at the last of these losses.
        experience: with its guesses from its own text; of_model: with those of the draft model.
        skipped: number of steps by the number of guessed tokens that were right, without those where it is 0.
    """

    __slots__ = (
        "adapter",
        "blame",
        "blocks",
        "cached",
        "content",
        "digests",
        "draft",
        "experience",
        "finished",
        "forced",
        "id",
        "images",
        "junction",
        "lockstep",
        "lockstep_at",
        "lost_at",
        "mask",
        "num_prompt",
        "of_model",
        "order",
        "own",
        "pending",
        "planned",
        "priority",
        "published",
        "queued",
        "restore",
        "running",
        "sampling",
        "skipped",
        "spans",
        "spread",
        "state",
        "stop_at",
        "tenant",
        "tokens",
        "trail",
        "trailed",
        "turned",
    )

    def __init__(
        self,
        id: int,
        prompt: Tokens[int],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        priority: int = 0,
        tenant: str = "",
        lockstep: bool = False,
        adapter: int = 0,
        content: int = 0,
        spans: Tokens[Span] = (),
        images: Tokens[EncodedImage | SeenImage] = (),
    ) -> None:
        self.id = id
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.stop_at = self.num_prompt + max_new_tokens
        self.sampling = sampling
        self.priority = priority
        self.tenant = tenant
        self.lockstep = lockstep
        self.lockstep_at = 0
        self.mask: bytes | None = None
        self.draft: Tokens[tuple[int, bytes]] = ()
        self.forced = 0
        self.adapter = adapter
        self.content = content
        self.spans = spans
        self.images = images
        self.turned = 0
        self.own = self.num_prompt
        self.planned = 0
        self.pending = 0
        self.spread = 0
        self.experience, self.of_model = Experience(), DraftRecord()
        self.skipped: dict[int, int] = {}
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.published = 0
        self.cached: int | None = None
        self.state: int | None = None
        self.restore: int | None = None
        self.junction = 0
        self.trail: tuple[int, int] | None = None
        self.trailed: bytes | None = None
        self.running = False
        self.queued = False
        self.finished = False
        self.blame = 0
        self.lost_at = 0
        self.order = 0

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def reach(self) -> int:
        """Number of tokens that it has at most when all plans are answered."""
        return len(self.tokens) + self.pending + self.spread

    @property
    def decodes(self) -> bool:
        """Whether its prompt and all its known tokens are planned, so that its next step is one token."""
        return self.planned == len(self.tokens) + self.pending - 1 and self.planned >= self.num_prompt

    @property
    def waits(self) -> bool:
        """Whether it cannot sample yet, because its last token or the mask of the next one is not known, or because it
        may have all its tokens."""
        if self.spread and self.reach >= self.stop_at:
            return True
        if not self.lockstep or self.reach < self.lockstep_at:
            return False
        return self.pending > 0 or self.mask is None

    def guesses(self, most: int) -> int:
        """How many of these tokens it may guess in its next step: it gets no more than it may, and before each of them
        it is known what may come."""
        if self.lockstep and self.reach >= self.lockstep_at:
            most = min(most, len(self.draft))
        elif self.lockstep:
            most = min(most, self.lockstep_at - 1 - self.reach)
        return max(0, min(most, self.stop_at - 1 - self.reach))

    @property
    def suspect(self) -> bool:
        """Whether it must run alone, until it has more tokens than at the last loss of the shards."""
        return self.blame >= SUSPECT and len(self.tokens) <= self.lost_at

    @property
    def lasting(self) -> bool:
        """Whether its chain says all that its keys depend on, so that they may outlive this process: the number of an
        adapter may be only its place among those that the model began with."""
        return not self.adapter or self.content != 0

    def seen(self, computed: int) -> bool:
        """Whether all rows of images are there that are needed once the first `computed` tokens are computed."""
        return all(span.stop <= computed or self._has(span) for span in self.spans)

    def _has(self, span: Span) -> bool:
        return span.image < len(self.images) and isinstance(self.images[span.image], EncodedImage)

    def chain(self, block_size: int) -> list[bytes]:
        """Digests of all whole blocks of known tokens; each is computed once."""
        digests = self.digests
        for index in range(len(digests), len(self.tokens) // block_size):
            parent = digests[-1] if digests else root(self.tenant, self.content or self.adapter, self.turned)
            first, stop = index * block_size, (index + 1) * block_size
            images = self.images_in(first, stop) if self.spans else b""
            digests.append(chain(parent, self.tokens[first:stop], images))
        return digests

    def images_in(self, first: int, stop: int) -> bytes:
        """What these positions hold of images, for the digest of a block: of each span the image's digest, the first
        row, its place and the number of rows. Empty without an image, so that such a block has the digest of its
        tokens."""
        spans, parts = self.spans, []
        for index in range(bisect_right(spans, first, key=STOP), len(spans)):
            span = spans[index]
            if span.start >= stop:
                break
            begin, end = max(first, span.start), min(stop, span.stop)
            parts.append(span.digest + struct.pack("<3I", span.offset + begin - span.start, begin - first, end - begin))
        return b"".join(parts)

    def border(self, first: int, stop: int) -> int:
        """Where a chunk that begins at `first` and may go up to `stop` ends. A span whose tokens see each other is
        computed in one step: the chunk ends before such a span or, if it begins there, behind it, which may be beyond
        `stop`."""
        index = bisect_right(self.spans, stop, key=STOP)
        if index == len(self.spans):
            return stop
        span = self.spans[index]
        if not span.whole or span.start >= stop:
            return stop
        return span.start if span.start > first else span.stop

    def media(self) -> list[MediaRows]:
        """The spans as a rank gets them; without rows if their keys are cached."""
        return media_rows(self.spans, self.images, self.planned)

    def forget_place(self) -> None:
        """Resets it to nothing computed, without row and blocks. Its tokens stay."""
        self.planned = self.published = 0
        self.blocks = []
        self.state = self.trail = None
        self.of_model.read = 0
        self.running = False


def media_rows(spans: Tokens[Span], images: Tokens[EncodedImage | SeenImage], planned: int = 0) -> list[MediaRows]:
    """Spans as a rank gets them. Those among the first `planned` tokens have no rows: their keys are computed."""
    return [_rows(span, images, planned) for span in spans]


def _rows(span: Span, images: Tokens[EncodedImage | SeenImage], planned: int) -> MediaRows:
    grid = None if span.grid is None else (span.grid.rows, span.grid.columns)
    if span.stop <= planned:
        return MediaRows(span.start, span.count, grid=grid, whole=span.whole)
    image = images[span.image]
    assert isinstance(image, EncodedImage)
    part = slice(span.offset, span.offset + span.count)
    added = [_bytes(rows[part]) for rows in image.added]
    return MediaRows(span.start, span.count, _bytes(image.rows[part]), added, grid, span.whole)


def _bytes(rows: Array) -> bytes:
    return np.ascontiguousarray(rows, np.float32).tobytes()
