"""The number of blocks of the paged cache."""

from __future__ import annotations

from inflight.contract import StateSize
from inflight.errors import StartError

SHARE = 0.9
"""Share of an accelerator's free memory, measured after the weights and a step of the largest size."""
CPU_SHARE = 0.4
"""Share of a machine's free memory, which other processes need too."""
AGAIN = 0.95
"""Share of the free memory when ranks are started again. It is more than `SHARE`: the cache has its size already, and a
second measurement may give a little less free memory than the first."""


def count_blocks(
    block_bytes: int,
    block_size: int,
    asked: int | None,
    available: int,
    share: float,
    most_tokens: int,
    before: int | None = None,
    ranks_here: int = 1,
    taken: int = 0,
) -> int:
    """The number of blocks of the cache.

    Args:
        block_bytes: memory of one block.
        asked: the cache's bytes (--kv-cache-memory); None: a share of what is available.
        available: free bytes of the device.
        most_tokens: tokens that all rows together may have; the cache is not made larger.
        before: blocks before the ranks were started again. The cache gets as many again, or fewer if the memory has
            shrunk. Given in blocks, because a new measurement would give another number of bytes.
        ranks_here: ranks that share the available memory evenly.
        taken: bytes of this rank's share, or of what is asked for, that recurrent states have.

    Raises:
        StartError: not one block fits, or more memory is asked for than is available.
    """
    if before is not None:
        room = int(available * AGAIN) // ranks_here - taken
        count = min(room // block_bytes, before)
    else:
        room = (asked if asked is not None else int(available * share) // ranks_here) - taken
        count = min(room // block_bytes, -(-most_tokens // block_size))
    if count < 1:
        raise StartError(
            f"the cache has {room >> 20} MiB and one block of {block_size} tokens needs {block_bytes >> 10} KiB; raise "
            "--kv-cache-memory or free memory"
        )
    if before is None and asked is not None and asked > available:
        raise StartError(
            f"--kv-cache-memory asks for {asked >> 20} MiB and the device has {available >> 20} MiB left; lower it"
        )
    return count


MOST_SPARE = 16
"""States behind guessed tokens, at most: a step guesses no more of them."""
LEAST_ALIGN, MOST_ALIGN = 64, 4096
"""Bounds of the distance in tokens between saved states of one prompt."""
FEW_ROWS = 4
"""Rows that have a state at least, as long as the memory lasts."""


def count_spare(state_bytes: int, room: int) -> int:
    """The number of states behind guessed tokens that a step keeps until it is known which are right: at most a
    sixteenth of the memory. Args: see `count_states`."""
    return min(MOST_SPARE, room // 16 // state_bytes)


def count_states(
    state_bytes: int, block_bytes: int, block_size: int, room: int, max_rows: int, longest: int
) -> StateSize:
    """The number of recurrent states: of rows, and saved ones of prefixes, each at most a quarter of the memory.

    A saved state for each `align` tokens doubles the memory of a cached token at most.

    Args:
        state_bytes, block_bytes: memory of a row's state, of a block of the paged cache.
        room: bytes of both.

    Raises:
        StartError: there is no memory for the states of `FEW_ROWS` rows.
    """
    by_token = max(1, block_bytes // block_size)
    align = LEAST_ALIGN
    while align < MOST_ALIGN and align * by_token < state_bytes:
        align *= 2
    align = -(-align // block_size) * block_size
    quarter = room // 4 // state_bytes
    rows = max(min(FEW_ROWS, max_rows), min(quarter, max_rows))
    if rows * state_bytes + block_bytes > room:
        raise StartError(
            f"the cache has {room >> 20} MiB, and the recurrent state of one row needs {state_bytes >> 10} KiB; raise "
            "--kv-cache-memory or free memory"
        )
    # As many as long rows have, and the ends of two prompts of each row.
    saved = min(quarter, max_rows * (2 + -(-longest // align)), (room - block_bytes) // state_bytes - rows)
    return StateSize(max(rows + saved, 2), state_bytes, align)
