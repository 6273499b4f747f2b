"""When the draft model guesses: whatever it is worth, hardly any time is lost by it, and what it brings is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import pytest

from inflight.contract import Draft, Sampling, StepResult
from inflight.sched import Capacity, Sequence
from inflight.sched.cache import Cache
from inflight.sched.drafting import OWED, SHARE, START
from inflight.sched.guesses import Guesses
from inflight.sched.plans import SentPlan
from inflight.sched.queues import Queues

PIECE = 256


@dataclass
class World:
    """A model whose plain step takes 1, and a draft model.

    Attributes:
        rates: how often the draft model is right, for rows of each kind; the even kinds are greedy.
        round, read, check: what takes a round of it, a token that it reads, and one to be checked.
        prompt, length: of each row.
        guessed, took: tokens, and seconds of all steps.
    """

    rates: Items[float]
    rows: int = 1
    length: int = 100
    round: float = 0.2
    read: float = 0.02
    check: float = 0.05
    prompt: int = 40
    guessed: int = 0
    took: float = 0.0
    _read: dict[int, int] = field(default_factory=dict)

    def pace(self, steps: int, seed: int) -> float:
        """Tokens of so many steps in the time in which a model without a draft makes one."""
        self._draw, self._count, self.guessed = random.Random(seed), 0, 0
        capacity = Capacity(64, 4, 64, 100, 100, 32, guesses=8, draft_length=10**6)
        guesses = Guesses(Cache(capacity))
        running, took, made = [self._row() for _ in range(self.rows)], 0.0, 0
        for _ in range(steps):
            result, sent = self._step(guesses, running)
            guesses.learn(sent, result, {row.id: row for row in running})
            took, made = took + result.seconds, made + len(result.ids)
            for index, row in enumerate(running):
                row.tokens += [1] * result.ids.count(row.id)
                row.planned = len(row.tokens) - 1
                if len(row.tokens) >= row.stop_at:
                    running[index] = self._row()
        self.took = took
        return made / self.rows / took

    def _row(self) -> Sequence:
        kind, self._count = self._count % len(self.rates), self._count + 1
        row = Sequence(self._count, [1] * self.prompt, Sampling(do_sample=kind % 2 == 1, seed=1), self.length)
        row.content, self._read[row.id] = kind, 0
        row.planned = len(row.tokens)
        row.tokens.append(1)
        return row

    def _step(self, guesses: Guesses, running: list[Sequence]) -> tuple[StepResult, SentPlan]:
        bars, drafts, ids = guesses.bars(running, Queues()), list[Draft](), list[int]()
        drafted, late = dict[int, int](), 0
        for row in running:
            most, right = row.guesses(guesses._wanted(row, bars)[1]), 0
            if most:
                drafts.append(Draft(row.id, 0, [], most))
                row.spread += most
                missing = len(row.tokens) - self._read[row.id]
                count = min(missing, PIECE - late)
                late += count if missing > 16 else 0
                self._read[row.id] += count
                if count == missing:
                    drafted[row.id] = most
                    while right < most and self._draw.random() < self.rates[row.content]:
                        right += 1
            ids += [row.id] * (1 + right)
        self.guessed += sum(drafted.values())
        drafting = self._noisy(self.round * max(drafted.values(), default=0) + self.read * late)
        seconds = self._noisy(1.0) + drafting + self._noisy(self.check * sum(drafted.values()))
        sent = SentPlan(0, list(running), [], drafts, True)
        told = {"drafted": drafted, "modelled": list(drafted), "drafting": drafting, "caught_up": late}
        return StepResult(0, ids, [1] * len(ids), seconds=seconds, **told), sent

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self._draw.gauss(0, 0.05))


def lost(world: World, steps: int, seed: int) -> float:
    """Plain steps' time that the draft model has lost beyond the share that it may."""
    pace = world.pace(steps, seed)
    return world.took * (1 - SHARE - pace)


CASES = [
    ([0.0], 1, 1000),
    ([0.16], 1, 100),
    ([0.3], 4, 1000),
    ([0.8], 4, 20),
    ([0.8, 0.1], 4, 100),
    ([0.8, 0.1, 0.0], 8, 20),
]
MORE = [(rate, rows, length) for rate in ([0.16], [0.3], [0.8, 0.1]) for rows in (1, 4, 8) for length in (20, 1000)]


@pytest.mark.parametrize(("rates", "rows", "length"), [*CASES, *MORE], ids=str)
def test_hardly_any_time_is_lost(rates: list[float], rows: int, length: int) -> None:
    """However often it is right: 1 % of the time, and once what may be owed."""
    assert lost(World(rates, rows, length), 600, 1) < START + OWED + 3


@pytest.mark.parametrize("settings", [{"round": 1.0}, {"check": 0.5}, {"prompt": 3000}, {"read": 0.2}], ids=str)
def test_nor_by_one_that_is_slow(settings: dict[str, float]) -> None:
    for rate in (0.1, 0.8):
        assert lost(World([rate], **settings), 600, 2) < START + OWED + 3  # type: ignore[arg-type]


def test_what_it_brings_is_kept() -> None:
    """Compared with what it would bring if all rows guessed as far as is best: (1 + r + ... + r^n) / (1 + n * cost)."""
    for rate, rows in ((0.8, 1), (0.9, 1), (0.9, 4)):
        best = max(sum(rate**n for n in range(d + 1)) / (1 + d * (0.2 + rows * 0.05)) for d in range(9))
        assert World([rate], rows, 1000).pace(1500, 3) > 1 + 0.75 * (best - 1)
    assert World([0.8, 0.1], 1, 300).pace(2000, 4) > 1.1, "rows of one kind pay, those of another do not"


def test_a_row_that_does_not_pay_tries_ever_less_often() -> None:
    world = World([0.05], length=100_000)
    world.pace(1000, 5)
    few = world.guessed
    world.pace(4000, 5)
    assert 0 < few < 60
    assert world.guessed < few + 20


class Changing(World):
    """Rows that are foreseen from their 700th token on."""

    def _step(self, guesses: Guesses, running: list[Sequence]) -> tuple[StepResult, SentPlan]:
        self.rates = [0.9 if len(running[0].tokens) > 700 else 0.0]
        return super()._step(guesses, running)


def test_a_text_that_begins_to_be_foreseen_is_noticed() -> None:
    assert Changing([0.0], length=9000, read=0.004).pace(3000, 6) > 1.25
