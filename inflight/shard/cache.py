"""The paged cache: how large it may be, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inflight.errors import StartError
from inflight.nn import AttentionSpec, LayerCache

SHARE = 0.9
"""Of an accelerator's free memory, after the weights and a step at its largest were seen."""
CPU_SHARE = 0.4
"""Of a machine's free memory: it is not ours alone."""


def block_bytes(layers: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(block_size * spec.num_kv_heads * (spec.head_dim + spec.value_dim) * dtype.itemsize for spec in layers)


def count_blocks(
    layers: Sequence[AttentionSpec],
    block_size: int,
    dtype: torch.dtype,
    asked: int | None,
    available: int,
    share: float,
    most_tokens: int,
    longest: int,
) -> int:
    """Blocks of the cache.

    Args:
        asked: bytes that were asked for, or None: a share of what is available.
        available: free bytes of the device.
        most_tokens: more than that could never be used.
        longest: tokens of the longest request.

    Raises:
        StartError: not even one request of `longest` tokens fits the memory asked for; or nothing fits at all.
    """
    each = block_bytes(layers, block_size, dtype)
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


def make_caches(
    layers: Sequence[AttentionSpec], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """One cache a layer, zeroed: a slot that was never written must not hold a NaN."""
    return [
        LayerCache(
            torch.zeros(blocks, block_size, spec.num_kv_heads, spec.head_dim, dtype=dtype, device=device),
            torch.zeros(blocks, block_size, spec.num_kv_heads, spec.value_dim, dtype=dtype, device=device),
        )
        for spec in layers
    ]
