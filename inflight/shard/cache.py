"""The paged cache: how large it may be."""

from __future__ import annotations

from inflight.errors import StartError

SHARE = 0.9
"""Of an accelerator's free memory, after the weights and a step at its largest were seen."""
CPU_SHARE = 0.4
"""Of a machine's free memory: it is not ours alone."""


def count_blocks(
    each: int,
    block_size: int,
    asked: int | None,
    available: int,
    share: float,
    most_tokens: int,
    longest: int,
) -> int:
    """Blocks of the cache.

    Args:
        each: bytes of one block.
        asked: bytes that were asked for, or None: a share of what is available.
        available: free bytes of the device.
        most_tokens: more than that could never be used.
        longest: tokens of the longest request.

    Raises:
        StartError: not even one request of `longest` tokens fits the memory asked for; or nothing fits at all.
    """
    room = asked if asked is not None else int(available * share)
    count = min(room // each, -(-most_tokens // block_size))
    if count < 1:
        raise StartError(
            f"the cache has {room >> 20} MiB and one block of {block_size} tokens needs {each >> 10} KiB; raise "
            "--kv-cache-memory or free memory"
        )
    if asked is not None and asked > available:
        raise StartError(
            f"--kv-cache-memory asks for {asked >> 20} MiB and the device has {available >> 20} MiB left; lower it"
        )
    return count
