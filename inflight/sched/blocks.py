"""The blocks of the paged KV cache: reference counts, free blocks and the prefix cache."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b

HASH_BYTES = 16
"""Size of a digest: with 128 bits two prefixes practically never have the same one."""


class Block:
    """One block. Free blocks form a linked list, least recently used first."""

    __slots__ = ("after", "before", "digest", "number", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.users = 0
        self.digest: bytes | None = None
        self.before: Block = self
        self.after: Block = self


class BlockPool:
    """Blocks 0 to n - 1 with reference counts, and the cache of published prefixes.

    A published block keeps its content after its last user has left, until it is the least recently used free block and
    a block is needed. Free blocks are linked through themselves, so a hit takes one from the middle at once.

    Attributes:
        on_drop: called with the digest of a published block whose content goes.
    """

    def __init__(self, count: int) -> None:
        self._blocks: list[Block] = []
        self._published: dict[bytes, Block] = {}
        self._ends = Block(-1)  # both ends of the ring of free blocks
        self.on_drop: Callable[[bytes], None] | None = None
        self.reset(count)

    def reset(self, count: int) -> None:
        """Makes all of `count` blocks free and forgets published prefixes, after a start of the shards.

        Block objects are reused: they refer to each other, so old ones would stay in memory until the garbage collector
        runs.
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
        """Takes `count` free blocks and forgets their content; None if fewer are free."""
        if count > self.free:
            return None
        taken: list[int] = []
        for _ in range(count):
            block = self._ends.after
            self._remove(block)
            if block.digest is not None:
                del self._published[block.digest]
                if self.on_drop is not None:
                    self.on_drop(block.digest)
                block.digest = None
            block.users = 1
            taken.append(block.number)
        return taken

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest published prefix of the chain. Does not take them."""
        numbers: list[int] = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            numbers.append(block.number)
        return numbers

    def share(self, numbers: Sequence[int]) -> None:
        """Adds a user to each of these published blocks."""
        for number in numbers:
            block = self._blocks[number]
            if not block.users:
                self._remove(block)
            block.users += 1

    def unused(self, numbers: Sequence[int]) -> int:
        """How many of these blocks are in the free list."""
        return sum(not self._blocks[number].users for number in numbers)

    def release(self, numbers: Sequence[int]) -> None:
        """Removes a user from each block. Of blocks that become free, the last of a chain is reused first."""
        for number in reversed(numbers):
            block = self._blocks[number]
            assert block.users > 0, f"block {number} is freed twice"
            block.users -= 1
            if not block.users:
                self._append(block)

    def publish(self, number: int, digest: bytes) -> None:
        """Publishes the content of a block, unless another block with the same content is published."""
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


def chain(parent: bytes, tokens: Sequence[int], images: bytes = b"") -> bytes:
    """The digest of a block of tokens that follows the prefix with the digest `parent`.

    Args:
        images: what the block holds of images (`Sequence.images_in`).
    """
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens) + images, digest_size=HASH_BYTES).digest()


def root(tenant: str, adapter: int = 0, turned: int = 0) -> bytes:
    """The digest at which the chains of one tenant, adapter and rotation of keys begin, so that only these share
    blocks."""
    return blake2b(tenant.encode(), digest_size=HASH_BYTES, salt=struct.pack("<QQ", adapter, turned)).digest()
