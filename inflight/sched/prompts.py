"""How prompts share the steps with rows that stream."""

from __future__ import annotations

from collections.abc import Sequence as Items

from inflight.sched.capacity import Capacity
from inflight.sched.plans import PlanInMaking
from inflight.sched.queues import Queues
from inflight.sched.sequence import Sequence

BURST = 1024
"""Prompt tokens for which rows that have just begun wait at most, when requests came together."""

BEGUN = 2
"""A row with at most this many tokens, known or pending, has just begun: the first token, and one that may have been
planned before the other requests of the burst arrived."""

SHARE = 8
"""Prompt tokens in a step for each request that waits for its first token, when many wait."""


class Burst:
    """Requests that came together: while all rows have just begun, they wait for the prompts of the others.

    So these requests get their first tokens at the full rate of prefill and then stream in one batch, which decodes as
    fast as a single row would. This holds for small bursts only: the first request waits for at most `BURST` prompt
    tokens, and not at all if more are to come.
    """

    def __init__(self) -> None:
        self._waited = 0  # prompt tokens that the rows of a burst, all of which have just begun, have waited for

    def waits(self, running: Items[Sequence], queues: Queues) -> list[int]:
        """Ids of the rows that could decode and wait for prompts in this step; empty if they do not wait."""
        begun = _just_begun(running)
        if not begun:
            self._waited = 0
            return []
        return [] if self._waited + _left(running, queues, BURST) > BURST else begun

    def waited(self, tokens: int) -> None:
        """Notes for how many prompt tokens they wait in this step."""
        self._waited += tokens

    def reset(self) -> None:
        self._waited = 0


def share(draft: PlanInMaking, capacity: Capacity, running: int, waiting: int) -> int:
    """The prompt tokens of a step in which rows decode.

    A step of a few rows takes as long as reading the weights. Up to `mixed_tokens` tokens, prompts use the
    arithmetic that is idle meanwhile: they run at their full rate, and every token comes a little later instead of
    some very late. At least, prompts get a token for each row that decodes, so that requests join as fast as they
    leave, plus `SHARE` tokens for each waiting request that could have a row: the more requests wait, the more
    the streaming rows give way. Chunks beside decoding rows: Agrawal et al., 2024, "Sarathi-Serve".

    Args:
        running: rows of the batch.
        waiting: requests without a row.
    """
    if not draft.rows or capacity.mixed_tokens is None:
        return draft.prefill_budget
    behind = running - draft.rows - len(draft.hold)
    behind += min(waiting, capacity.max_rows - running)
    return min(draft.prefill_budget, max(capacity.mixed_tokens - draft.rows, draft.rows + SHARE * behind))


def _just_begun(running: Items[Sequence]) -> list[int]:
    """Ids of the rows that could decode; empty if one of them streams already."""
    begun: list[int] = []
    for row in running:
        if not row.decodes:
            continue
        if len(row.tokens) + row.pending > row.num_prompt + BEGUN:
            return []
        begun.append(row.id)
    return begun


def _left(running: Items[Sequence], queues: Queues, most: int) -> int:
    """Prompt tokens that no plan computes yet. Counting of waiting requests stops above `most`."""
    left = unplanned(running)
    for sequence in queues:
        if left > most:
            break
        left += len(sequence.tokens)
    return left


def unplanned(running: Items[Sequence]) -> int:
    """Known tokens of rows that no plan computes yet."""
    return sum(len(row.tokens) - row.planned for row in running if not row.decodes)
