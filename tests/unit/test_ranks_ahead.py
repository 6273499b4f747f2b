"""Processes of ranks that start before the server: taken where they fit, ended where nobody takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflight.config import GeneratorConfig
from inflight.link import create_file
from inflight.place import end_ahead, start_ahead, start_rank
from inflight.place.ranks import _ahead

CONFIG = GeneratorConfig.of(Path("/nowhere"), "story")


@pytest.fixture
def file() -> Iterator[int]:
    found = create_file("inflight-test", 4096)
    yield found
    end_ahead()
    os.close(found)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_takes_the_process_that_was_started_ahead(file: int, tmp_path: Path) -> None:
    start_ahead(CONFIG, tmp_path)
    ((_, ahead),) = _ahead.values()
    taken = start_rank(CONFIG, 0, tmp_path, file, append=False)
    assert taken is ahead
    assert not _ahead
    taken.end()
    again = start_rank(CONFIG, 0, tmp_path, file, append=True)
    assert again.pid != taken.pid
    again.end()


def test_one_that_was_started_for_something_else_is_ended(file: int, tmp_path: Path) -> None:
    start_ahead(CONFIG, tmp_path)
    ((_, ahead),) = _ahead.values()
    other = start_rank(GeneratorConfig.of(Path("/nowhere"), "story", threads=1), 0, tmp_path, file, append=False)
    assert other.pid != ahead.pid
    assert not runs(ahead.pid)
    other.end()


def test_what_nobody_takes_ends(tmp_path: Path) -> None:
    start_ahead(GeneratorConfig.of(Path("/nowhere"), "story", tensor_parallel=2), tmp_path)
    pids = [process.pid for _, process in _ahead.values()]
    assert len(pids) == 2
    end_ahead()
    assert not any(runs(pid) for pid in pids)
