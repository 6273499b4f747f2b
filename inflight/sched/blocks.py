"""The paged cache's blocks: who has which, and which still hold a prefix that somebody may ask for again."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16
"""128 bits: two prefixes never meet by chance."""


class Block:
    """One block; free ones form a list, least recently used first."""

    __slots__ = ("after", "before", "digest", "number", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0
        self.digest: bytes | None = None
        self.before: Block = self
        self.after: Block = self


class BlockPool:
    """Blocks 0 to n - 1 with reference counts, and the cache of published prefixes.

    A published block keeps its content when its last user leaves, until it is the least recently used free block and
    somebody needs one. Free blocks are linked through themselves, so a hit takes one from the middle at once.
    """

    def __init__(self, count: int) -> None:
        self._blocks: list[Block] = []
        self._published: dict[bytes, Block] = {}
        self._ends = Block(-1)  # both ends of the ring of free blocks
        self.reset(count)

    def reset(self, count: int) -> None:
        """`count` blocks, all of them free, and nothing published: the shards started anew.

        The blocks themselves stay: they refer to each other, and old ones would fill memory until the garbage collector
        comes to them.
        """
        self.count = count
        del self._blocks[count:]
        self._blocks += [Block(number) for number in range(len(self._blocks), count)]
        self._published.clear()
        self._ends.before = self._ends.after = self._ends
        self.free = 0
        for block in self._blocks:
            block.users, block.digest = 0, None
            self._append(block)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with nothing in them, or None where fewer are free."""
        if count > self.free:
            return None
        taken: list[int] = []
        for _ in range(count):
            block = self._ends.after
            self._remove(block)
            if block.digest is not None:
                del self._published[block.digest]
                block.digest = None
            block.users = 1
            taken.append(block.number)
        return taken

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest published prefix of the chain; they are not taken yet."""
        found: list[int] = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            found.append(block.number)
        return found

    def share(self, numbers: Sequence[int]) -> None:
        """One more user for each of these published blocks."""
        for number in numbers:
            block = self._blocks[number]
            if not block.users:
                self._remove(block)
            block.users += 1

    def unused(self, numbers: Sequence[int]) -> int:
        """How many of these blocks are in the free list."""
        return sum(not self._blocks[number].users for number in numbers)

    def release(self, numbers: Sequence[int]) -> None:
        """One user less for each; the last blocks of a chain are reused first."""
        for number in reversed(numbers):
            block = self._blocks[number]
            assert block.users > 0, f"block {number} is freed twice"
            block.users -= 1
            if not block.users:
                self._append(block)

    def publish(self, number: int, digest: bytes) -> None:
        """Says what a block holds. Where another block holds the same already, this one stays private."""
        block = self._blocks[number]
        if block.digest is None and digest not in self._published:
            block.digest = digest
            self._published[digest] = block

    def _append(self, block: Block) -> None:
        ends = self._ends
        block.before, block.after = ends.before, ends
        ends.before.after = block
        ends.before = block
        self.free += 1

    def _remove(self, block: Block) -> None:
        block.before.after, block.after.before = block.after, block.before
        self.free -= 1


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a block of tokens after the prefix that `parent` stands for."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=HASH_BYTES).digest()


def root(tenant: str, adapter: int = 0, turned: int = 0) -> bytes:
    """Where chains of one tenant, one adapter and one way to turn keys begin: nobody else's prompts can be found from
    there."""
    return blake2b(tenant.encode(), digest_size=HASH_BYTES, salt=struct.pack("<QQ", adapter, turned)).digest()
