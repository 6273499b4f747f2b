"""The guesses of rows within plans: which rows may guess how many tokens, and what has come of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import NamedTuple

from inflight.contract import Draft, StepResult
from inflight.sched.cache import Cache
from inflight.sched.drafting import Drafting
from inflight.sched.plans import PlanInMaking, SentPlan
from inflight.sched.queues import Queues
from inflight.sched.sequence import Sequence
from inflight.sched.speculation import Speculation


class Bars(NamedTuple):
    """Which guesses are worth their time in a step.

    Attributes:
        text: how likely a token from a row's own text must be right; None: none is worth it.
        model: some row guesses with the draft model.
    """

    text: float | None = None
    model: bool = False


class Guesses:
    """Plans guesses by the policy (`Speculation`), as far as blocks and tokens of a step go.

    A row's own text costs nothing to ask, so it is asked first, unless the draft model promises more.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        capacity = cache.capacity
        self._text = Speculation(capacity.guesses, capacity.mixed_tokens)
        self._model = Drafting(capacity.guesses if capacity.draft_length else 0)

    def bars(self, running: Items[Sequence], queues: Queues) -> Bars:
        """The bars of the next step, in which prompts use the idle arithmetic better.

        Args:
            running: rows of the batch.
        """
        bar = self._bar(running, queues)
        if bar is None:
            return Bars()
        plain, _ = self._text.seconds(len(running))
        return Bars(bar, self._model.begin(running, bar, plain))

    def _bar(self, running: Items[Sequence], queues: Queues) -> float | None:
        bar = self._text.bar(len(running))
        return None if bar is None or queues or not all(row.decodes for row in running) else bar

    def plan(self, row: Sequence, draft: PlanInMaking, running: int, bars: Bars) -> int:
        """Plans the guess of a row that decodes, as far as its blocks and free ones go; returns the most tokens that it
        may have.

        Args:
            running: number of rows of the batch.
        """
        pool, capacity = self._cache.pool, self._cache.capacity
        if 0 < capacity.switch < row.stop_at and not row.turned:
            return 0  # at that length all keys are computed anew, which is planned by counts
        text, model = self._wanted(row, bars)
        size = capacity.block_size
        place = row.planned + row.spread + 1
        left = running - draft.rows  # rows whose newest tokens are still to come, this one included
        used = draft.rows + sum(each.room for each in draft.drafts) + left
        room = min(self._text.room - used, draft.budget - left, (len(row.blocks) + pool.free) * size - place)
        room = self._cache.states.guesses(row, room)
        text, model = (max(0, min(row.guesses(most), room)) for most in (text, model))
        most = max(text, model)
        if most <= 0:
            return 0
        for block in pool.take(max(0, -(-(place + most) // size) - len(row.blocks))) or ():
            row.blocks.append(block)
            draft.grants.append((row.id, block))
        draft.drafts.append(Draft(row.id, text, [token for token, _ in row.draft[:text]], model))
        draft.budget -= most
        row.spread += most
        return most

    def _wanted(self, row: Sequence, bars: Bars) -> tuple[int, int]:
        """The tokens that a row guesses from its text (or has been given), and by the draft model."""
        if row.draft:
            return len(row.draft), 0
        known = len(row.tokens)
        text = 0 if bars.text is None else self._text.length(row.experience, known, bars.text)
        if not bars.model:
            return text, 0
        model = min(self._model.length(row), self._cache.capacity.draft_length - row.reach - 1)
        if text and model > 0 and bars.text is not None:
            promised = self._model.gain(row, model)
            if row.of_model.probe or self._text.gain(row.experience, text, bars.text) < promised:
                text = 0
        return text, model

    def hopes(self, row: Sequence, running: Items[Sequence], queues: Queues) -> tuple[int, int]:
        """Of the next `draft` of a row in `lockstep`, tokens that its grammar forces, and that are guessed, at most."""
        bar = self._bar(running, queues)
        guesses = 0 if bar is None else self._text.length(row.experience, len(row.tokens), bar)
        room = max(0, self._text.room - len(running))  # each place takes a mask, which costs time
        return min(self._text.forced, room), guesses

    def learn(self, sent: SentPlan, result: StepResult, requests: Mapping[int, Sequence]) -> None:
        """Notes what guesses have brought and what they have cost.

        Args:
            requests: those that are not finished, by their ids.
        """
        if not self._text.most or not (sent.drafts or sent.decodes):
            return
        right: dict[int, int] = {}
        for id in result.ids:
            right[id] = right.get(id, -1) + 1
        for draft in sent.drafts:
            row = requests.get(draft.id)
            if row is None:
                continue
            row.spread -= draft.room
            found, guessed = right.get(draft.id, 0), result.drafted.get(draft.id, 0)
            if found:
                row.skipped[found] = row.skipped.get(found, 0) + 1
            if draft.id in result.modelled:
                self._model.tried(row, guessed, found)
                continue
            if draft.model and not guessed:
                self._model.missed(row, result.caught_up)
            forced = min(row.forced, guessed) if draft.tokens else 0
            if forced:
                self._text.tried_forced(forced, min(found, forced))
            if guessed > forced and found >= forced:
                self._text.tried(row.experience, guessed - forced, found - forced)
        if sent.decodes and right:
            rows = len(right)
            self._text.took(rows, sum(result.drafted.values()), result.seconds - result.drafting)
            self._model.took(result, rows, *self._text.seconds(rows))
