"""Pages of a chain of blocks: runs of blocks that lie in one file.

A page begins at a multiple of `PAGE` tokens. Its file is named by the digest of its last block, which stands for all
tokens before it too. A whole page has `PAGE` tokens; the last one of a prefix may be shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PAGE = 256
"""Tokens of a whole page: a file of 3 MB for a model of 0.5 billion weights, of 32 MB for one of 8 billion. Prompts of
fewer tokens are computed in less time than it takes to think about files."""


class Piece(NamedTuple):
    """A page: blocks `first` to `stop` - 1 of a chain. Attributes: key: digest of the last one."""

    key: bytes
    first: int
    stop: int


def page_blocks(block_size: int) -> int:
    """Blocks of a whole page."""
    return max(1, PAGE // block_size)


def whole_pages(digests: Sequence[bytes], size: int) -> list[Piece]:
    """The whole pages of a chain. Args: size: `page_blocks`."""
    return [Piece(digests[stop - 1], stop - size, stop) for stop in range(size, len(digests) + 1, size)]


def tail(digests: Sequence[bytes], stop: int, size: int) -> Piece:
    """The page that ends with block `stop` - 1, which is shorter than a whole one unless `stop` is a multiple."""
    return Piece(digests[stop - 1], (stop - 1) // size * size, stop)
