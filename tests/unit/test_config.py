"""What this process may use of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inflight.config import processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities, which Linux has")
def test_processors_are_those_of_the_affinity() -> None:
    code = "import os; from inflight.config import processors; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; print(processors())"], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["1"]


@pytest.mark.parametrize(
    ("quota", "granted"),
    [
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("1000000000 100000", None),
        ("max 100000", None),
        ("100000 0", None),
        ("", None),
        ("nothing of the kind", None),
        (None, None),
    ],
)
def test_processors_are_at_most_those_that_the_control_group_grants(
    tmp_path: Path, quota: str | None, granted: int | None
) -> None:
    file = tmp_path / "cpu.max"
    everything = processors(file)
    if quota is not None:
        file.write_text(quota + "\n")
    assert processors(file) == (everything if granted is None else min(granted, everything))
