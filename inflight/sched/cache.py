"""What sequences hold of the shards' memory: the blocks of their keys, and the slots of their recurrent states."""

from __future__ import annotations

from collections.abc import Sequence as Items

from inflight.sched.blocks import BlockPool
from inflight.sched.capacity import Capacity
from inflight.sched.sequence import Sequence
from inflight.sched.states import States

EXPECTED_OUTPUT = 512
"""Tokens that a row is expected to generate at most when admission estimates the peak use of the cache. Most requests
end long before a generous `max_new_tokens`. If the estimate is wrong, the youngest row is preempted."""


class Cache:
    """Says what a sequence finds in the cache and what it may take of it, and publishes what plans compute.

    Attributes:
        pool: the blocks.
        states: the recurrent states.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.pool = BlockPool(capacity.num_blocks)
        self.states = States(capacity.states, capacity.align, capacity.block_size)
        if capacity.states:
            self.pool.on_drop = self.states.pool.forget

    def reset(self, capacity: Capacity) -> None:
        """Forgets what the shards held, after a start of them."""
        self.capacity = capacity
        self.pool.reset(capacity.num_blocks)
        self.states.reset(capacity.states)

    def shared(self, sequence: Sequence) -> list[int]:
        """The blocks with which a sequence would begin."""
        self._turn(sequence)
        digests = [] if sequence.sampling.needs_whole_prompt else sequence.chain(self.capacity.block_size)
        # At least one token is computed, for its logits.
        blocks = self.pool.find(digests[: (len(sequence.tokens) - 1) // self.capacity.block_size])
        if not self.capacity.states:
            return blocks
        # Layers with a state go on from a saved one only.
        return blocks[: self.states.usable(sequence, digests[: len(blocks)])]

    def fits(self, running: Items[Sequence], sequence: Sequence, shared: Items[int]) -> bool:
        """Whether the batch with a further request stays within the cache at its estimated peak.

        With the rows sorted by the output they still expect, longest first, the k-th ends when each of the first k
        has grown by that much: the peak is the largest of (remaining_k * k + lengths of the first k), LightLLM's
        estimate.

        Args:
            running: rows of the batch.
            shared: the blocks with which the request begins.
        """
        free = self.pool.free - self.pool.unused(shared)
        if free <= 0:
            return False
        if not running:
            return True
        size = self.capacity.block_size
        rows = [*running, sequence]
        pairs = sorted(
            ((min(row.stop_at - len(row.tokens), EXPECTED_OUTPUT), len(row.tokens)) for row in rows), reverse=True
        )
        peak = total = 0
        for count, (remaining, length) in enumerate(pairs, 1):
            total += length + size - 1  # a row's last block is seldom full
            peak = max(peak, remaining * count + total)
        # Shared blocks in use need no further memory; unused ones are taken from the free list like any other.
        used = len(shared) - self.pool.unused(shared)
        return peak - used * size <= self.capacity.total_tokens

    def enter(self, sequence: Sequence, shared: list[int]) -> bool:
        """Gives a sequence the blocks with which it begins, and a state; False: rows have all slots of states."""
        if not self.states.give(sequence, len(shared)):
            return False
        self.pool.share(shared)
        sequence.blocks = list(shared)
        sequence.planned = len(shared) * self.capacity.block_size
        sequence.published = len(shared)
        return True

    def leave(self, row: Sequence) -> None:
        """Takes all from a row: nothing of it is computed any more, but for what is published."""
        self.pool.release(row.blocks)
        self.states.take_back(row)
        row.forget_place()

    def room(self, row: Sequence, budget: int, prefill_budget: int) -> tuple[int, int]:
        """Tokens of a row's next chunk, 0 if there is no room, and the blocks that it needs.

        A span whose tokens see each other may exceed the prompt's share of a step in which rows decode, but not what a
        step can hold.

        Args:
            budget: tokens that the step can still hold.
            prefill_budget: the prompts' share of them.
        """
        size, start = self.capacity.block_size, row.planned
        stop = start + min(len(row.tokens) - start, budget, prefill_budget)
        if stop <= start:
            return 0, 0
        stop = row.border(start, stop) if row.spans else stop
        most = (len(row.blocks) + self.pool.free) * size
        if stop > most > start:
            stop = row.border(start, most) if row.spans else most
        if stop > most or stop - start > budget:
            return 0, 0
        return stop - start, -(-stop // size) - len(row.blocks)

    def publish(self, row: Sequence) -> None:
        """Publishes the whole blocks of known tokens that plans so far fill, so that others can share them."""
        size = self.capacity.block_size
        whole = min(row.planned, len(row.tokens)) // size
        if whole > row.published:
            digests = row.chain(size)
            for index in range(row.published, whole):
                self.pool.publish(row.blocks[index], digests[index])
            row.published = whole
            if row.trail is not None:
                self.states.publish_trail(row)

    def _turn(self, sequence: Sequence) -> None:
        """Sets `turned`: keys that depend on a sequence's length are shared only by sequences of the same variant."""
        capacity = self.capacity
        turned = sequence.num_prompt if 0 < capacity.stretched < sequence.num_prompt else 0
        if 0 < capacity.switch < len(sequence.tokens):
            turned = 1
        if turned != sequence.turned:
            sequence.turned = turned
            sequence.digests.clear()
