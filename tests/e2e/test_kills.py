"""The short form of `make chaos`."""

from __future__ import annotations

import random
from pathlib import Path

from tests.chaos import run

KILLS = 4


def test_nobody_sees_that_processes_are_killed(tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    report = run(tmp_path, KILLS, 0.8, seed, alone=False)
    assert not report.problems, (seed, report.problems)
    assert not report.left, (seed, report.left)
    assert sum(report.kills.values()) == KILLS
    assert sum(report.answers.values()) > 0
