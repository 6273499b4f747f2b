"""Garbage collection is rare while a program starts, and as usual afterwards."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import gc
usual = gc.get_threshold()
from inflight import early
early.collect_rarely()
rare = gc.get_threshold()
import inflight.server
assert gc.get_threshold() == rare and rare[0] > 10 * usual[0], rare
from inflight.startup import settle
settle()
assert gc.get_threshold() == usual and gc.isenabled() and gc.get_freeze_count() > 50_000
"""


def test_collection_is_rare_until_the_start_is_over() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
