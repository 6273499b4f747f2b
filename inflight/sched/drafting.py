"""Whether and how far the draft model guesses in a step: where it is expected to bring more time than it takes.

Unlike a guess from the text, one of the draft model takes time of its own: one round of its steps for each place, in
which all rows that guess share, and the tokens that it has not read yet. All of these times are measured. What guesses
have brought and taken is kept as an account, which a small share of the time that passes is paid into. Trying out rows
for which guesses have not paid, and reading long texts, is paid from it: so whatever the texts are, and however often
they change, no more than this share is lost in the long run.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from inflight.contract import FRESH, StepResult
from inflight.sched.sequence import Sequence
from inflight.sched.speculation import HOPE, MARGIN, PACE, PAUSE, Experience

COST = 0.2
"""Share of a step of the model that one of the draft model is expected to take before one was measured."""
READ_COST = 0.1
"""Share of a step of the draft model that a token takes that it reads, before one was measured."""
SHARE = 0.01
"""Share of the time that may be lost by the draft model."""
START = 8
"""Steps' time that may be lost at once at the beginning."""
MOST = 32
"""Steps' time that may be saved on the account."""
OWED = 16
"""Steps' time that may be owed. What owes more waits until nothing is owed."""
PROBE = 4
"""Guesses of a row with which is found out whether they pay now."""
LONGEST = 4096
"""A row's tokens before a further probe, at most."""


@dataclass(slots=True)
class _Pace:
    """A time that is measured again and again. Attributes: seconds: None: it was not yet."""

    seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Notes a measurement."""
        before = seconds if self.seconds is None else self.seconds
        self.seconds = before + PACE * (min(seconds, 3.0 * before) - before)


class Drafting:
    """The policy, and what it has learnt of one replica.

    Args:
        most: tokens that a row guesses at most; 0: there is no draft model.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rounds: dict[int, _Pace] = {}  # a round of the draft model, by its rows
        self._read = _Pace()  # a token that it reads
        self._kinds: dict[tuple[bool, bool], Experience] = {}  # of rows: what a new one of the kind may hope for
        self._account: float | None = None  # seconds; None: no step was measured yet
        self._owes = False
        self._plain = 0.0  # seconds of a step of the model without guesses, with the rows of the step in the making
        self._step = _Step({}, 0, 0.0, 0.0)

    def begin(self, running: Items[Sequence], bar: float, plain: float | None) -> bool:
        """Decides for a step in the making which rows guess how far; returns whether any does.

        Args:
            running: rows of the batch, which decode.
            bar: how likely a guess must be right to be worth being checked (`Speculation.bar`).
            plain: seconds of a step with these rows without guesses; None: it is not known.
        """
        self._step, self._plain = _Step({}, 0, bar, 0.0), plain or 0.0
        if not self._most or plain is None or self._paused():
            return False
        rates = {row.id: self._rate(row) for row in running if _may(row)}
        rates = {id: rate for id, rate in rates.items() if rate >= bar}
        # In tokens of the batch, which makes one a row in a plain step.
        cost = MARGIN * self._round(max(1, len(rates))) / plain * len(running)
        depth = 0
        while depth < self._most and sum(max(0.0, rate ** (depth + 1) - bar) for rate in rates.values()) >= cost:
            depth += 1
        self._step = _Step(rates if depth else {}, depth, bar, cost / max(1, len(rates)))
        self._leave_unread(running)
        self._probe(running)
        return bool(self._step.rates)

    def length(self, row: Sequence) -> int:
        """Tokens that the draft model guesses for a row in the step."""
        rate = self._step.rates.get(row.id)
        if rate is None:
            return 0
        if row.of_model.probe:
            return 1
        return self._length(rate)

    def gain(self, row: Sequence, count: int) -> float:
        """Tokens that so many guesses of a row are expected to bring beyond what they cost."""
        step = self._step
        return sum(step.rates.get(row.id, 0.0) ** n - step.bar - step.share for n in range(1, count + 1))

    def tried(self, row: Sequence, guessed: int, right: int) -> None:
        """Notes a row's guess, before its tokens are known."""
        record = row.of_model
        for each in (record.experience, self._kind(row)):
            each.add(guessed, right)
        record.read = record.at = len(row.tokens)
        if record.probe:
            record.probe -= 1
        elif right:
            record.pause = PAUSE

    def missed(self, row: Sequence, read: int) -> None:
        """Notes that a row got no guess. Args: read: tokens that the draft model has read instead."""
        record = row.of_model
        record.read = min(len(row.tokens), record.read + read)
        if not read:
            record.probe = 0

    def took(self, result: StepResult, rows: int, plain: float | None, token: float) -> None:
        """Notes the time of a step without prompts.

        Args:
            rows: that have got tokens.
            plain: seconds of a step with these rows without guesses, if it is known.
            token: seconds that a guess to check takes.
        """
        guessed = [result.drafted[id] for id in result.modelled]
        rounds, drafting = max(guessed, default=0), result.drafting
        if rounds and not result.caught_up:
            self._rounds.setdefault(len(guessed), _Pace()).add(drafting / rounds)
        elif result.caught_up:
            own = rounds * self._round(len(guessed)) if rounds else 0.0
            self._read.add(max(0.0, drafting - own) / result.caught_up)
        if plain is None:
            return
        if self._account is None:
            self._account = START * plain
        right = sum(result.ids.count(id) - 1 for id in result.modelled)
        self._account += SHARE * result.seconds + right * plain / rows - drafting - sum(guessed) * token
        self._account = min(self._account, MOST * plain)

    def _paused(self) -> bool:
        """Whether too much is owed."""
        account = 0.0 if self._account is None else self._account
        self._owes = account < 0.0 if self._owes else account < -OWED * self._plain
        return self._owes

    def _leave_unread(self, running: Items[Sequence]) -> None:
        """Leaves out rows whose text would take longer to read than what they are expected to gain."""
        for row in running:
            missing = len(row.tokens) - row.of_model.read
            rate = self._step.rates.get(row.id)
            if rate is None or missing <= FRESH:
                continue
            reading = missing * self._reading()
            # A text goes on for about as long as it has been going on.
            gained = self.gain(row, self._length(rate)) * row.generated * self._plain / len(running)
            if gained < reading or (self._account or 0.0) - reading < -OWED * self._plain:
                del self._step.rates[row.id]

    def _probe(self, running: Items[Sequence]) -> None:
        """Lets one row that does not guess try it, if the account has the time and the row has waited."""
        rates, bar = self._step.rates, self._step.bar
        trying = next((row for row in running if row.of_model.probe), None)
        if trying is not None and trying.id in rates:
            trying.of_model.probe = 0  # it pays
            trying = None
        if trying is None:
            for row in running:
                record = row.of_model
                if row.id in rates or not _may(row) or row.reach - max(record.at, row.num_prompt) < record.pause:
                    continue
                unread = max(0, len(row.tokens) - record.read)
                cost = unread * self._reading() + PROBE * (self._round(1) + bar / len(running) * self._plain)
                if self._account is None or self._account < cost:
                    continue
                record.probe, record.pause = PROBE, min(2 * record.pause, LONGEST)
                record.experience.halve()
                trying = row
                break
        if trying is not None:
            rates[trying.id] = self._rate(trying)

    def _length(self, rate: float) -> int:
        likely, count = rate, 0
        while count < self._step.depth and likely >= self._step.bar:
            likely *= rate
            count += 1
        return count

    def _rate(self, row: Sequence) -> float:
        return row.of_model.experience.rate(self._kind(row).rate(HOPE))

    def _kind(self, row: Sequence) -> Experience:
        """The experience with rows that choose in its way: of drawn tokens fewer are guessed right, and the draft model
        wears no adapter."""
        return self._kinds.setdefault((row.sampling.greedy, bool(row.adapter)), Experience())

    def _round(self, rows: int) -> float:
        """Seconds of a round with so many rows."""
        known = [count for count in self._rounds if count <= rows] or list(self._rounds)
        pace = self._rounds[max(known)] if known else _Pace()
        return self._plain * COST if pace.seconds is None else pace.seconds

    def _reading(self) -> float:
        """Seconds of a token that the draft model reads."""
        return self._round(1) * READ_COST if self._read.seconds is None else self._read.seconds


@dataclass(slots=True)
class _Step:
    """What is decided for a step.

    Attributes:
        rates: how likely a guess is right, of each row that guesses, by its id.
        depth: tokens that they guess at most.
        bar: see `Drafting.begin`.
        share: tokens of the batch that a round takes, for each row that guesses.
    """

    rates: dict[int, float]
    depth: int
    bar: float
    share: float


def _may(row: Sequence) -> bool:
    """Whether the draft model could guess for a row: it sees no images, and knows no grammar."""
    return not row.spans and not (row.lockstep and row.reach >= row.lockstep_at)
