"""The guesses of rows within plans: which rows may guess how many tokens, and what has come of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

from inflight.contract import Draft, StepResult
from inflight.sched.cache import Cache
from inflight.sched.plans import PlanInMaking, SentPlan
from inflight.sched.queues import Queues
from inflight.sched.sequence import Sequence
from inflight.sched.speculation import Speculation


class Guesses:
    """Plans guesses by the policy (`Speculation`), as far as blocks and tokens of a step go.

    Args:
        running: rows of the batch.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._speculation = Speculation(cache.capacity.guesses, cache.capacity.mixed_tokens)

    def bar(self, running: Items[Sequence], queues: Queues) -> float | None:
        """How likely a guessed token must be right in the next step; None: no row guesses. Prompts use the idle
        arithmetic better."""
        bar = self._speculation.bar(len(running))
        if bar is None or queues or not all(row.decodes for row in running):
            return None
        return bar

    def plan(self, row: Sequence, draft: PlanInMaking, running: int, bar: float | None) -> int:
        """Plans the guess of a row that decodes, as far as its blocks and free ones go; returns the most tokens that it
        may have.

        Args:
            running: number of rows of the batch.
            bar: as `bar` says.
        """
        pool, capacity = self._cache.pool, self._cache.capacity
        if 0 < capacity.switch < row.stop_at and not row.turned:
            return 0  # at that length all keys are computed anew, which is planned by counts
        speculation, size = self._speculation, capacity.block_size
        most = len(row.draft)
        if not most and bar is not None:
            most = speculation.length(row.experience, len(row.tokens), bar)
        place = row.planned + row.spread + 1
        left = running - draft.rows  # rows whose newest tokens are still to come, this one included
        used = draft.rows + sum(each.most for each in draft.drafts) + left
        most = min(row.guesses(most), speculation.room - used, draft.budget - left)
        most = min(most, (len(row.blocks) + pool.free) * size - place)
        if most <= 0:
            return 0
        for block in pool.take(max(0, -(-(place + most) // size) - len(row.blocks))) or ():
            row.blocks.append(block)
            draft.grants.append((row.id, block))
        draft.drafts.append(Draft(row.id, most, [token for token, _ in row.draft[:most]]))
        draft.budget -= most
        row.spread += most
        return most

    def hopes(self, row: Sequence, running: Items[Sequence], queues: Queues) -> tuple[int, int]:
        """Of the next `draft` of a row in `lockstep`, tokens that its grammar forces, and that are guessed, at most."""
        bar = self.bar(running, queues)
        guesses = 0 if bar is None else self._speculation.length(row.experience, len(row.tokens), bar)
        room = max(0, self._speculation.room - len(running))  # each place takes a mask, which costs time
        return min(self._speculation.forced, room), guesses

    def learn(self, sent: SentPlan, result: StepResult, requests: Mapping[int, Sequence]) -> None:
        """Notes what guesses have brought and what they have cost.

        Args:
            requests: those that are not finished, by their ids.
        """
        if not self._speculation.most or not (sent.drafts or sent.decodes):
            return
        right: dict[int, int] = {}
        for id in result.ids:
            right[id] = right.get(id, -1) + 1
        for draft in sent.drafts:
            row = requests.get(draft.id)
            if row is None:
                continue
            row.spread -= draft.most
            found = right.get(draft.id, 0)
            if found:
                row.skipped[found] = row.skipped.get(found, 0) + 1
            guessed = result.drafted.get(draft.id, 0)
            forced = min(row.forced, guessed) if draft.tokens else 0
            if forced:
                self._speculation.tried_forced(forced, min(found, forced))
            if guessed > forced and found >= forced:
                self._speculation.tried(row.experience, guessed - forced, found - forced)
        if sent.decodes and right:
            self._speculation.took(len(right), sum(result.drafted.values()), result.seconds)
