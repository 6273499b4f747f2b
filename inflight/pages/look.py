"""Which part of a prompt lies in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from inflight.pages.chain import Piece, tail, whole_pages
from inflight.pages.files import PageFiles


class Found(NamedTuple):
    """The longest prefix in files.

    Attributes:
        pieces: its pages, from the first block on; the last one may reach beyond `blocks`.
        blocks: of the prefix.
        state: a recurrent state is there behind it.
    """

    pieces: list[Piece]
    blocks: int
    state: bool = False


def look(files: PageFiles, digests: Sequence[bytes], size: int, recurrent: bool) -> Found:
    """Looks for a prompt's prefix. Reads the folder only, a file may still turn out to be damaged.

    Args:
        digests: of the blocks that are of use.
        size: blocks of a page.
        recurrent: a prefix is of use only where a state lies behind it.
    """
    pieces: list[Piece] = []
    for piece in whole_pages(digests, size):
        if not files.exists(piece.key, state=False):
            break
        pieces.append(piece)
    first = len(pieces) * size
    for stop in range(min(len(digests), first + size - 1), first, -1):
        if files.exists(digests[stop - 1], state=False):
            pieces.append(tail(digests, stop, size))
            break
    blocks = pieces[-1].stop if pieces else 0
    if not recurrent:
        return Found(pieces, blocks)
    while blocks and not files.exists(digests[blocks - 1], state=True):
        blocks -= 1
    return Found([piece for piece in pieces if piece.first < blocks], blocks, bool(blocks))
