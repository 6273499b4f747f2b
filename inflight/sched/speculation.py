"""How many of its next tokens a row guesses: as many as are expected to bring more than they cost.

A step of few rows takes as long as reading the weights, so a few tokens more cost little: where a guess is right, a row
gets several tokens for the time of one. What a guessed token costs and how often it is right are both measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ROOM = 32
"""Tokens of a step beyond which the arithmetic is busy anyway, where the capacity does not say so."""

HOPE = 0.5
"""Share of guessed tokens that is expected to be right before there is experience."""
WEIGHT = 2.0
"""Guessed tokens whose experience weighs as much as this expectation."""
FADE = 0.9
"""What is left of it with each further guess."""
MEMORY = 0.99
"""What is left of it with each further token of the row, so that a text that begins to copy is noticed."""

FORCED = 16
"""Tokens that a grammar forces and that are computed in one step, at most."""
SAME = 0.9
"""Share of forced tokens that a model is expected to write as the tokenizer does, before there is experience."""
OTHER = 0.3
"""The share below which they are not worth a step."""

COST = 0.05
"""Share of a step that a guessed token is expected to cost before one was measured."""
LEAST = 0.01
"""The same at least: measurements of what costs nothing are noise."""
PACE = 0.2
"""Weight of a new measurement of time."""
OUTLIER = 3.0
"""A measurement counts as at most so many times what was measured before."""
AGE = 64
"""Steps with guesses after which one without is made, to know what that costs now."""
MARGIN = 1.2
"""A guessed token has to bring so many times what it costs."""

PAUSE = 16
"""A row's tokens before the first probe of the draft model's guesses; doubled with each further one."""


@dataclass(slots=True)
class Experience:
    """How often guessed tokens were right. A guess ends with the first wrong one, those behind it say nothing.

    Attributes:
        right, tried: tokens, where older ones count less.
        at: tokens that the row had when they were counted.
    """

    right: float = 0.0
    tried: float = 0.0
    at: int = 0

    def rate(self, hope: float = HOPE) -> float:
        """The share of guessed tokens that is expected to be right."""
        return (self.right + WEIGHT * hope) / (self.tried + WEIGHT)

    def add(self, guessed: int, right: int) -> None:
        """Notes a guess."""
        self.right = FADE * self.right + right
        self.tried = FADE * self.tried + right + (right < guessed)

    def halve(self) -> None:
        """Lets what comes next count more."""
        self.right *= 0.5
        self.tried *= 0.5

    def grow_old(self, tokens: int) -> None:
        """Lets the experience fade up to this number of tokens."""
        if self.tried and tokens > self.at:
            left = MEMORY ** (tokens - self.at)
            self.right *= left
            self.tried *= left
        self.at = tokens


@dataclass(slots=True)
class DraftRecord:
    """What is known of the draft model's guesses for a row.

    Attributes:
        experience: with them.
        read: leading tokens that the draft model has computed, as far as it is known.
        at: tokens that the row had when it guessed last.
        probe: guesses left with which is found out whether they pay.
        pause: tokens without guesses before the next probe.
    """

    experience: Experience = field(default_factory=Experience)
    read: int = 0
    at: int = 0
    probe: int = 0
    pause: int = PAUSE


@dataclass(slots=True)
class _Cost:
    """Of steps with one number of rows.

    Attributes:
        plain: seconds of a step without guesses; None: there was none yet.
        token: share of such a step that one guessed token takes.
        age: steps with guesses since the last one without.
    """

    plain: float | None = None
    token: float = COST
    age: int = 0


class Speculation:
    """The policy, and what it has learnt of one replica.

    Args:
        most: tokens that a row guesses at most; 0: none ever.
        room: tokens of a step, newest and guessed ones of all rows together.
    """

    def __init__(self, most: int, room: int | None = None) -> None:
        self.most = most
        self.room = ROOM if room is None else room
        self._costs: dict[int, _Cost] = {}  # by rows
        self._all = Experience()  # of all rows: what a new one may hope for
        self._forced = Experience()  # with what grammars force

    def bar(self, rows: int) -> float | None:
        """How likely a guessed token must be right to be worth its time in a step with so many rows; None: none is.

        Such a step makes a token for each row, so a guessed token that takes a share s of its time has to bring more
        than rows * s tokens.
        """
        if not self.most or not 0 < rows < self.room:
            return None
        cost = self._costs.get(rows)
        if cost is None or cost.plain is None or cost.age >= AGE:
            return None  # one step without guesses shows what they are compared with
        return MARGIN * rows * max(cost.token, LEAST)

    def length(self, experience: Experience, tokens: int, bar: float) -> int:
        """Guesses of a row that has this experience and so many tokens. The n-th one is right where all before it
        are."""
        experience.grow_old(tokens)
        rate = experience.rate(self._all.rate())
        likely, count = rate, 0
        while count < self.most and likely >= bar:
            likely *= rate
            count += 1
        return count

    def gain(self, experience: Experience, count: int, bar: float) -> float:
        """Tokens that so many guesses are expected to bring beyond what they cost."""
        rate = experience.rate(self._all.rate())
        return sum(rate**n - bar for n in range(1, count + 1))

    def seconds(self, rows: int) -> tuple[float | None, float]:
        """What a step with so many rows takes without guesses, None if that was not measured yet; and how much longer
        each guessed token makes it."""
        cost = self._costs.get(rows)
        return (None, 0.0) if cost is None or cost.plain is None else (cost.plain, cost.plain * cost.token)

    @property
    def forced(self) -> int:
        """Tokens that a grammar forces and that a row takes at once, at most."""
        return FORCED if self.most and self._forced.rate(SAME) >= OTHER else 0

    def tried_forced(self, guessed: int, right: int) -> None:
        """Notes how many of the tokens that a grammar forces a row has written as they were."""
        self._forced.add(guessed, right)

    def tried(self, experience: Experience, guessed: int, right: int) -> None:
        """Notes a row's guess."""
        for each in (experience, self._all):
            each.add(guessed, right)

    def took(self, rows: int, guessed: int, seconds: float) -> None:
        """Notes the time of a step in which nothing but these rows' newest and guessed tokens was computed."""
        if seconds <= 0.0 or rows >= self.room:
            return
        self._all.grow_old(self._all.at + rows)
        cost = self._costs.setdefault(rows, _Cost())
        if not guessed:
            cost.age = 0
            plain = seconds if cost.plain is None else cost.plain
            cost.plain = plain + PACE * (min(seconds, OUTLIER * plain) - plain)
            return
        cost.age += 1
        if cost.plain is not None:
            share = max(0.0, seconds / cost.plain - 1.0) / guessed
            cost.token += PACE * (min(share, OUTLIER * max(cost.token, COST)) - cost.token)
