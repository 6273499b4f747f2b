"""Orders to ranks that copy parts of their caches to files and back (`--prompt-cache`), beside the steps.

Orders and plans share one queue, so an order sees what the plans before it have computed, and plans behind the answer
of an order may use what it has read.
"""

from __future__ import annotations

import msgspec


class Page(msgspec.Struct, array_like=True, frozen=True):
    """One file: the blocks of up to 256 tokens, or a recurrent state.

    Attributes:
        key: digest of the chain's last block (`inflight.sched.blocks.chain`), which names the file.
        blocks: numbers of the blocks in the order of the tokens; -1: a block that is not read.
        state: slot of a state; -1: the file has blocks.
        place: number of the page in its chain. Of files that were used together the last ones are deleted first.
    """

    key: bytes
    blocks: list[int] = []
    state: int = -1
    place: int = 0


class Transfer(msgspec.Struct, array_like=True, frozen=True, tag=30):
    """Server to rank: copies between the cache and files. Nobody else changes these blocks until the answer.

    Attributes:
        number: of the order; it is never used again.
        load: from files to the cache, up to the first page that cannot be read; else to files.
    """

    number: int
    load: bool
    pages: list[Page]


class Transferred(msgspec.Struct, array_like=True, frozen=True, tag=31):
    """Rank to server: the end of an order.

    Attributes:
        done: number of leading pages that are in place.
        bytes, seconds: that were read or written, and the time without waiting for other orders.
    """

    number: int
    done: int
    bytes: int = 0
    seconds: float = 0.0
