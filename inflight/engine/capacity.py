"""Resolves the configured limits of a model with what its shards can hold."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from inflight.config import GeneratorConfig, Policy
from inflight.contract import GenerationLimits, ShardOffer
from inflight.errors import StartError
from inflight.sched import Capacity


@dataclass(frozen=True)
class Room:
    """The limits of a request, the batching policy and the scheduler's capacity, all resolved."""

    limits: GenerationLimits
    policy: Policy
    capacity: Capacity


def resolve(config: GeneratorConfig, offer: ShardOffer, *, again: bool, reads_images: bool = False) -> Room:
    """Fits the configuration to the shards.

    Args:
        reads_images: requests may hold images.
        again: the shards were started before. Memory may have become short since, so limits that no longer fit are
            lowered.

    Raises:
        StartError: at the first start, the configuration asks for more than the shards can hold.
    """
    policy = config.policy.resolved(offer.device_type, offer.max_rows)
    blocks = offer.cache.num_blocks
    if policy.max_batch_total_tokens is not None:
        blocks = min(blocks, max(1, policy.max_batch_total_tokens // offer.cache.block_size))
    room = blocks * offer.cache.block_size
    longest = min(offer.max_model_len, room)
    total = config.limits.max_total_tokens or longest
    if total > longest:
        if not again:
            raise StartError(
                f"max_total_tokens {total} is more than the model's length of {offer.max_model_len} or the cache's "
                f"{room} tokens; lower it or raise --kv-cache-memory"
            )
        total = longest
    inputs = config.limits.max_input_tokens or total - 1
    if inputs >= total:
        if not again:
            raise StartError(f"max_input_tokens {inputs} must be less than max_total_tokens {total}")
        inputs = total - 1
    policy = msgspec.structs.replace(policy, max_batch_total_tokens=room)
    limits = GenerationLimits.of(config.limits, inputs, total, reads_images)
    return Room(limits, policy, Capacity.of(offer, policy, blocks))
