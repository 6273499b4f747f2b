"""What the shards and the flags allow a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from inflight.config import Policy
from inflight.contract import ShardOffer


@dataclass(frozen=True)
class Capacity:
    """Limits set by the shards and the flags.

    Attributes:
        num_blocks, block_size: of the cache.
        max_rows: rows of the batch (`max_batch_size`).
        max_step_tokens: tokens of one step, decoding rows and chunks together.
        max_prefill_tokens: of them, tokens of chunks (`max_batch_prefill_tokens`).
        mixed_tokens: tokens up to which chunks fill a step in which rows decode (`max_batch_mixed_tokens`). None: the
            same limits as for other steps, and rows do not wait for the prompts of a burst.
        switch, stretched: of `ShardOffer`.
        states: slots of recurrent states; 0: the model has none.
        align: tokens between the states that are saved of a long prompt.
        guesses: of its next tokens that a row guesses at most; 0: none.
        draft_length: of `ShardOffer`.
    """

    num_blocks: int
    block_size: int
    max_rows: int
    max_step_tokens: int
    max_prefill_tokens: int
    mixed_tokens: int | None = None
    switch: int = 0
    stretched: int = 0
    states: int = 0
    align: int = 0
    guesses: int = 0
    draft_length: int = 0

    @classmethod
    def of(cls, offer: ShardOffer, policy: Policy, num_blocks: int) -> Capacity:
        """The limits of the shards' offer and a policy that is resolved for them."""
        rows, prefill = policy.max_batch_size, policy.prefill_tokens(offer.device_type)
        mixed, size = policy.max_batch_mixed_tokens, offer.cache.block_size
        model, states = offer.model, offer.states
        return cls(
            num_blocks,
            size,
            rows,
            prefill + rows,
            prefill,
            mixed,
            model.switch,
            model.stretched,
            states.slots,
            states.align,
            policy.guesses if model.drafts else 0,
            offer.draft_length,
        )

    @property
    def total_tokens(self) -> int:
        return self.num_blocks * self.block_size
