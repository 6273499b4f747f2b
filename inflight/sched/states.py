"""The recurrent states of a model that has them: those of rows, and saved ones of prefixes."""

from __future__ import annotations

from collections.abc import Sequence


class StatePool:
    """Slots 0 to n - 1 of a rank's states.

    A slot is free, or belongs to a row, or holds the saved state behind a prefix whose last block has a digest
    (`inflight.sched.blocks.chain`). Saved states go when their slots are needed, least recently used first. Plans run
    in order, so a slot may be taken in the very plan that still reads it: the copy comes first.
    """

    def __init__(self, count: int) -> None:
        self._free: list[int] = []
        self._saved: dict[bytes, int] = {}  # least recently used first
        self.reset(count)

    def reset(self, count: int) -> None:
        """Makes all slots free, after a start of the shards."""
        self.count = count
        self._saved.clear()
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
        if not self._saved:
            return None
        return self._saved.pop(next(iter(self._saved)))

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

    def longest(self, digests: Sequence[bytes]) -> int:
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
        if slot is not None:
            self.release(slot)
