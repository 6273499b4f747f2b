"""The paged cache: how large it may be."""

from __future__ import annotations

from inflight.errors import StartError

SHARE = 0.9
"""Of an accelerator's free memory, after the weights and a step at its largest were seen."""
CPU_SHARE = 0.4
"""Of a machine's free memory: it is not ours alone."""
AGAIN = 0.95
"""Of what is free when ranks are started again, for a cache that has its size already. It is more than `SHARE`, because
nobody measures twice the same."""


def count_blocks(
    each: int,
    block_size: int,
    asked: int | None,
    available: int,
    share: float,
    most_tokens: int,
    before: int | None = None,
    ranks_here: int = 1,
) -> int:
    """Blocks of the cache.

    Args:
        each: bytes of one block.
        asked: bytes that were asked for, or None: a share of what is available.
        available: free bytes of the device.
        most_tokens: more than that could never be used.
        before: blocks that it had before its ranks were started again: it has as many again, and fewer only where the
            memory is no longer there. Blocks and not bytes: the same bytes need not come to the same number.
        ranks_here: ranks that share what is available; each of them takes its part.

    Raises:
        StartError: not one block fits, or more is asked for than there is.
    """
    if before is not None:
        room = int(available * AGAIN) // ranks_here
        count = min(room // each, before)
    else:
        room = asked if asked is not None else int(available * share) // ranks_here
        count = min(room // each, -(-most_tokens // block_size))
    if count < 1:
        raise StartError(
            f"the cache has {room >> 20} MiB and one block of {block_size} tokens needs {each >> 10} KiB; raise "
            "--kv-cache-memory or free memory"
        )
    if before is None and asked is not None and asked > available:
        raise StartError(
            f"--kv-cache-memory asks for {asked >> 20} MiB and the device has {available >> 20} MiB left; lower it"
        )
    return count
