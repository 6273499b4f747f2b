"""Shards without a model: they keep the step contract to the letter and fail a test where the engine does not.

A cache slot holds the digest of all tokens up to its position, so that a row which reads a block with another prefix,
or one that somebody overwrote, is caught at once. The "model" is a hash of the whole prefix: a wrong token anywhere
changes every later one. A row with a `top_k` writes a text of so many different tokens that repeats itself, with a
surprise now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import msgspec
import numpy as np

from inflight.contract import CacheSize, MediaRows, ModelFacts, Sampling, ShardOffer, StepPlan, StepResult
from inflight.engine import Executor, RanksKilled
from inflight.errors import StartError, WorkerLost
from inflight.sched import guess

VOCAB = 997


def prefix_digest(parent: bytes, token: int, row: bytes = b"") -> bytes:
    """The digest of a prefix. Where a row of an image stands, the token is not computed with."""
    return blake2b(parent + (row or token.to_bytes(4, "little")), digest_size=8).digest()


def next_token(digest: bytes, sampling: Sampling, tokens: Sequence[int] = ()) -> int:
    """Args: tokens: known ones, of which the last two count where the text repeats itself."""
    salt = sampling.seed.to_bytes(8, "little") if sampling.do_sample else b""
    if sampling.top_k:
        last = bytes(token % 251 for token in tokens[-2:]) if digest[0] % 16 else digest
        return int.from_bytes(blake2b(last + salt, digest_size=8).digest(), "little") % sampling.top_k
    return int.from_bytes(blake2b(digest + salt, digest_size=8).digest(), "little") % VOCAB


def expected(
    prompt: Sequence[int], count: int, sampling: Sampling = Sampling(), rows: Mapping[int, bytes] = {}
) -> list[int]:
    """The tokens that a request gets when it is alone.

    Args:
        rows: embeddings from images, by position.
    """
    digest = b""
    for position, token in enumerate(prompt):
        digest = prefix_digest(digest, token, rows.get(position, b""))
    out = []
    for _ in range(count):
        out.append(next_token(digest, sampling, [*prompt, *out]))
        digest = prefix_digest(digest, out[-1])
    return out


class Row:
    def __init__(self, tokens: list[int], num_prompt: int, computed: int, sampling: Sampling) -> None:
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.computed = computed
        self.sampling = sampling
        self.blocks: list[int] = []
        self.rows: dict[int, bytes] = {}
        self.spans: list[MediaRows] = []

    def see(self, media: list[MediaRows]) -> None:
        """Takes the rows of images, by position."""
        self.spans = media
        for span in media:
            width = len(span.rows) // span.count
            assert width or span.start + span.count <= self.computed
            for index in range(span.count if width else 0):
                self.rows[span.start + index] = span.rows[index * width : (index + 1) * width]

    def cached(self, position: int) -> bool:
        """Whether the position is of an image whose rows were not sent."""
        return any(span.start <= position < span.start + span.count and not span.rows for span in self.spans)

    def check_cut(self, stop: int) -> None:
        """Tokens that see each other are computed in one step."""
        for span in self.spans:
            assert not (span.whole and span.start < stop < span.start + span.count), "a step cuts an image"


class ShardsDied(Exception):
    """A poisonous row was computed."""


class FakeShards:
    """The device side of the contract, synchronous.

    Attributes:
        poison: by row, the position at which computing it kills the shards.
        right, wrong: guessed tokens that were.
    """

    def __init__(self, num_blocks: int, block_size: int, max_rows: int, max_step_tokens: int = 10**9) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self.slots: list[bytes | None] = [None] * (num_blocks * block_size)
        self.rows: dict[int, Row] = {}
        self.step = 0
        self.computed_tokens = 0
        self.poison: dict[int, int] = {}
        self.right = self.wrong = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.step
        self.step += 1
        for id in plan.filter:
            del self.rows[id]
        for id, block in plan.grants:
            self.rows[id].blocks.append(block)
        chunks = {}
        for admission in plan.prefill:
            assert admission.id not in chunks
            if admission.token_ids is not None:
                assert admission.id not in self.rows
                assert admission.sampling is not None
                assert admission.num_cached < len(admission.token_ids)
                self.rows[admission.id] = Row(
                    list(admission.token_ids), admission.num_prompt, admission.num_cached, admission.sampling
                )
                self.rows[admission.id].see(admission.media)
            self.rows[admission.id].blocks.extend(admission.blocks)
            assert admission.chunk >= 1
            chunks[admission.id] = admission.chunk
        assert len(self.rows) <= self.max_rows
        ids, tokens, total = [], [], 0
        drafts, drafted, modelled = {draft.id: draft for draft in plan.drafts}, {}, list[int]()
        for id, row in self.rows.items():
            chunk = chunks.get(id)
            if chunk is None:
                decodes = row.computed == len(row.tokens) - 1 and row.computed >= row.num_prompt
                if id in plan.hold or not decodes:
                    continue
                chunk = 1
            known, draft = len(row.tokens), drafts.pop(id, None)
            if draft is not None:
                assert id not in chunks
                assert draft.room >= 1
                assert draft.most >= len(draft.tokens)
                assert row.computed + 1 + draft.room <= len(row.blocks) * self.block_size
                row.tokens += draft.tokens or guess(np.array(row.tokens, np.int32), draft.most).tolist()
                if len(row.tokens) == known and draft.model:
                    row.tokens += self._modelled(row, draft.model)
                    modelled.append(id)
                chunk += len(row.tokens) - known
                if chunk > 1:
                    drafted[id] = chunk - 1
            total += chunk
            row.check_cut(row.computed + chunk)
            for _ in range(chunk):
                if self.poison.get(id) == row.computed:
                    raise ShardsDied
                self._compute(row)
            assert row.computed <= len(row.tokens)
            if row.computed == len(row.tokens):
                own = self._sampled(row, known)
                ids += [id] * len(own)
                tokens += own
        assert not drafts, "a row guesses that does not decode"
        assert 0 < total <= self.max_step_tokens
        self._blocks_that_are_not_full_have_one_owner()
        self.computed_tokens += total
        return StepResult(plan.step, ids, tokens, seconds=1e-3, drafted=drafted, modelled=modelled)

    def _modelled(self, row: Row, most: int) -> list[int]:
        """The guesses of a draft model, which is wrong now and then."""
        right = expected(row.tokens, most, row.sampling, row.rows)
        return [token if (token + len(row.tokens)) % 5 else (token + 1) % VOCAB for token in right]

    def _sampled(self, row: Row, known: int) -> list[int]:
        """Samples behind the last of the known tokens, and behind the guessed ones as long as they are right."""
        guessed, row.tokens = row.tokens[known:], row.tokens[:known]
        own: list[int] = []
        for place in range(len(guessed) + 1):
            last = self.slots[self._slot(row, known - 1 + place)]
            assert last is not None
            own.append(next_token(last, row.sampling, row.tokens))
            row.tokens.append(own[-1])
            if place < len(guessed) and own[-1] != guessed[place]:
                break
        self.right, self.wrong = self.right + len(own) - 1, self.wrong + len(guessed) - len(own) + 1
        row.computed = len(row.tokens) - 1
        return own

    def _slot(self, row: Row, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _compute(self, row: Row) -> None:
        position = row.computed
        digest = b""
        for earlier in range(position):
            kept = self.slots[self._slot(row, earlier)]
            if earlier in row.rows or not row.cached(earlier):
                digest = prefix_digest(digest, row.tokens[earlier], row.rows.get(earlier, b""))
                assert kept == digest, f"position {earlier} holds something else"
            else:  # the rows of a cached image are not sent
                assert kept is not None
                digest = kept
        self.slots[self._slot(row, position)] = prefix_digest(digest, row.tokens[position], row.rows.get(position, b""))
        row.computed += 1

    def _blocks_that_are_not_full_have_one_owner(self) -> None:
        users: dict[int, int] = {}
        for row in self.rows.values():
            assert all(0 <= block < self.num_blocks for block in row.blocks)
            for block in row.blocks:
                users[block] = users.get(block, 0) + 1
        for row in self.rows.values():
            for index in range(row.computed // self.block_size, len(row.blocks)):
                assert users[row.blocks[index]] == 1, "a block that is not full belongs to two rows"


class FakeExecutor(Executor):
    """`FakeShards` behind the engine's interface; `kill` makes the plans in flight fail.

    Attributes:
        starts: how often shards were started.
        failing_starts: starts to come that fail with a reason; killed_starts: and without one.
        asked_blocks: what each start was asked for; room: blocks that there is memory for, when started again.
        poison: a prompt token that kills the shards whenever it is computed.
        poisonous: as `FakeShards.poison`, for all starts.
        pace: seconds a step takes.
    """

    def __init__(self, num_blocks: int = 256, block_size: int = 4, max_rows: int = 32, vocab: int = VOCAB) -> None:
        self._sizes = block_size, max_rows
        cache = CacheSize(num_blocks, block_size)
        self.offer = ShardOffer(
            ModelFacts("fake", "float32", vocab, drafts=True), cache, max_rows, num_blocks * block_size, "cpu"
        )
        self.shards: FakeShards | None = None
        self.starts = 0
        self.failing_starts = 0
        self.killed_starts = 0
        self.asked_blocks: list[int | None] = []
        self.room = num_blocks
        self.poison: int | None = None
        self.poisonous: dict[int, int] = {}
        self.pace = 0.0
        self.stuck = False
        self.most_in_flight = 0
        self._plans: list[StepPlan] = []
        self._dead = asyncio.Event()

    @property
    def lost(self) -> bool:
        return self._dead.is_set()

    async def start(self, num_blocks: int | None = None) -> ShardOffer:
        self.starts += 1
        self.asked_blocks.append(num_blocks)
        if self.killed_starts:
            self.killed_starts -= 1
            raise RanksKilled("it was killed while it loaded")
        if self.failing_starts:
            self.failing_starts -= 1
            raise StartError("it does not start")
        if num_blocks is not None:
            cache = CacheSize(min(num_blocks, self.room), self.offer.cache.block_size)
            self.offer = msgspec.structs.replace(self.offer, cache=cache)
        await asyncio.sleep(0)
        self.shards = FakeShards(self.offer.cache.num_blocks, *self._sizes)
        self.shards.poison = self.poisonous
        self._plans = []
        self._dead = asyncio.Event()
        self.stuck = False
        return self.offer

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self.most_in_flight = max(self.most_in_flight, len(self._plans))

    async def result(self) -> StepResult:
        try:
            await asyncio.wait_for(self._dead.wait(), 3600 if self.stuck else self.pace)
        except asyncio.TimeoutError:
            pass
        if self._dead.is_set() or self.shards is None:
            raise WorkerLost("the shards died")
        plan = self._plans.pop(0)
        for admission in plan.prefill:
            if self.poison is not None and self.poison in (admission.token_ids or ()):
                self.kill()
                raise WorkerLost("the shards died")
        try:
            return self.shards.run(plan)
        except ShardsDied:
            self.kill()
            raise WorkerLost("the shards died") from None

    def kill(self) -> None:
        self._dead.set()
        self.shards = None
        self.on_lost()

    async def abort(self) -> None:
        self.kill()

    async def close(self) -> None:
        self.kill()
