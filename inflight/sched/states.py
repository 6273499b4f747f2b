"""The recurrent states of a model that has them: those of rows, and saved ones of prefixes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TypeAlias

from inflight.sched.sequence import Sequence

TRAIL = 32
"""Tokens after which the recurrent state of a row that decodes is saved anew, so that the next turn of a chat begins
near the end of the last answer. A copy takes some 1 % of the time of so many steps."""

IN_FLIGHT = 2
"""Further plans that are made before the answer of one."""

Saves: TypeAlias = "list[tuple[int, int, int]]"
"""Copies within a plan: the row, the number of tokens before the state, the slot that it is copied to."""


class StatePool:
    """Slots 0 to n - 1 of a rank's states.

    A slot is free, or belongs to a row, or holds the saved state behind a prefix whose last block has a digest
    (`inflight.sched.blocks.chain`). Saved states go when their slots are needed, least recently used first. Plans run
    in order, so a slot may be taken in the very plan that still reads it: the copy comes first.
    """

    def __init__(self, count: int) -> None:
        self._free: list[int] = []
        self._saved: dict[bytes, int] = {}  # least recently used first
        self._held: dict[int, bool] = {}  # slots that are being copied; True: their states are forgotten
        self.reset(count)

    def reset(self, count: int) -> None:
        """Makes all slots free, after a start of the shards."""
        self.count = count
        self._saved.clear()
        self._held.clear()
        self._free = list(reversed(range(count)))

    @property
    def saved(self) -> int:
        """Number of saved states."""
        return len(self._saved)

    @property
    def used(self) -> int:
        """Slots that are not free: of rows, and saved ones."""
        return self.count - len(self._free)

    def take(self) -> int | None:
        """A slot whose content is forgotten; None if rows have all of them."""
        if self._free:
            return self._free.pop()
        if self._held:
            digest = next((digest for digest, slot in self._saved.items() if slot not in self._held), None)
        else:
            digest = next(iter(self._saved), None)
        return None if digest is None else self._saved.pop(digest)

    def release(self, slot: int) -> None:
        """Makes a slot free."""
        self._free.append(slot)

    def publish(self, slot: int, digest: bytes) -> None:
        """Makes a taken slot the saved state of a prefix; of two of one prefix the first stays."""
        if digest in self._saved:
            self.release(slot)
        else:
            self._saved[digest] = slot

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._saved

    def longest(self, digests: Items[bytes]) -> int:
        """How many leading blocks of a chain the longest prefix with a saved state has."""
        saved = self._saved
        if saved:
            for count in range(len(digests), 0, -1):
                if digests[count - 1] in saved:
                    return count
        return 0

    def use(self, digest: bytes) -> int:
        """The slot of a saved state, which becomes the one used last."""
        slot = self._saved.pop(digest)
        self._saved[digest] = slot
        return slot

    def forget(self, digest: bytes) -> None:
        """Frees the saved state of a prefix, if there is one."""
        slot = self._saved.pop(digest, None)
        if slot in self._held:
            self._held[slot] = True
        elif slot is not None:
            self.release(slot)

    def hold(self, digest: bytes) -> int | None:
        """The slot of a saved state, which keeps its content until `let_go`; None: there is none, or it is held
        already."""
        slot = self._saved.get(digest)
        if slot is None or slot in self._held:
            return None
        self._held[slot] = False
        return slot

    def let_go(self, slot: int) -> None:
        """Ends a `hold`."""
        if self._held.pop(slot):
            self.release(slot)


class States:
    """The policy: which rows have a state, with which saved one a row begins, and which states are saved.

    Args:
        count: slots; 0: the model has no layers with a state, and nothing here does anything.
        align: tokens between the states that are saved of a long prompt.
        size: tokens of a block.

    Attributes:
        pool: the slots.
    """

    def __init__(self, count: int, align: int, size: int) -> None:
        self.pool = StatePool(count)
        self._align, self._size = align, size
        self._stride = -(-TRAIL // size) * size  # whole blocks
        self._saving: list[tuple[int, bytes]] = []  # slots of the last plan's saves, with the digests of their prefixes

    def reset(self, count: int) -> None:
        """Forgets all states, after a start of the shards. Args: count: slots from now on."""
        self.pool.reset(count)
        self._saving.clear()

    def usable(self, sequence: Sequence, digests: Items[bytes]) -> int:
        """Of blocks that are cached, how many a sequence may begin behind: those in front of a saved state. Notes a
        place where a state was missed, so that the next one is saved there."""
        count = self.pool.longest(digests)
        sequence.junction = len(digests) * self._size if len(digests) > count else 0
        return count

    def give(self, sequence: Sequence, blocks: int) -> bool:
        """Gives a sequence the slot of its state, and the one that it begins with; False: none is free.

        Args:
            blocks: that it shares with the prefix cache, as `usable` said.
        """
        if not self.pool.count:
            return True
        sequence.restore = self.pool.use(sequence.digests[blocks - 1]) if blocks else None
        sequence.state = self.pool.take()
        return sequence.state is not None

    def take_back(self, row: Sequence) -> None:
        """Frees the slot of a row that leaves, and the one of a save that nobody can find."""
        if row.state is not None:
            self.pool.release(row.state)
        if row.trail is not None:
            self.pool.release(row.trail[1])
        row.state = row.trail = None

    def save_prompt(self, row: Sequence, start: int, saves: Saves) -> None:
        """Plans copies of a row's state within a chunk from `start` on: at multiples of `align`, behind the last whole
        block in front of the prompt's last token, and where a prefix ended whose state was missing."""
        size, align, stop = self._size, self._align, row.planned
        end = (len(row.tokens) - 1) // size * size
        places = [*range((start // align + 1) * align, stop + 1, align), row.junction, end]
        digests = row.chain(size)
        for place in dict.fromkeys(sorted(places)):
            if not start < place <= min(stop, end) or digests[place // size - 1] in self.pool:
                continue
            slot = self.pool.take()
            if slot is None:
                return
            saves.append((row.id, place, slot))
            self._saving.append((slot, digests[place // size - 1]))

    def publish(self) -> None:
        """Lets later rows begin with what the plan before has saved of prompts."""
        for slot, digest in self._saving:
            self.pool.publish(slot, digest)
        self._saving.clear()

    def guesses(self, row: Sequence, most: int) -> int:
        """How many of these tokens a row may guess: it decodes the place where its state is saved, and those before it
        in the plans in flight, one by one, so that the place is known when it is planned."""
        if row.state is None or row.trail is not None or row.sampling.needs_whole_prompt:
            return most
        place = (row.planned // self._stride + 1) * self._stride
        return min(most, place - row.planned - row.spread - 1 - IN_FLIGHT)

    def save_decoding(self, row: Sequence, saves: Saves) -> None:
        """Plans a copy of a decoding row's state now and then. It is published when the tokens before it are known
        (`publish_trail`)."""
        if row.planned % self._stride or row.trail is not None or row.sampling.needs_whole_prompt:
            return
        slot = self.pool.take()
        if slot is not None:
            row.trail = row.planned, slot
            saves.append((row.id, row.planned, slot))

    def publish_trail(self, row: Sequence) -> None:
        """Publishes the state that a decoding row has saved, in place of the one before, if its tokens are known."""
        assert row.trail is not None
        position, slot = row.trail
        if position > len(row.tokens):
            return
        digest, row.trail = row.chain(self._size)[position // self._size - 1], None
        if row.trailed is not None and row.trailed != digest:
            self.pool.forget(row.trailed)
        row.trailed = digest
        self.pool.publish(slot, digest)
