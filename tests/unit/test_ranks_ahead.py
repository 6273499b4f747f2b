"""Processes of ranks that start before the server: taken where they fit, ended where nobody takes them."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from inflight import early
from inflight.config import GeneratorConfig, ServerConfig
from inflight.early import plain_model
from inflight.engine import ShardGroup
from inflight.errors import StartError
from inflight.link import ServerChannel, create_file
from inflight.place import end_ahead, shard_job, start_ahead, start_rank
from inflight.place.ranks import _ahead

CONFIG = GeneratorConfig.of(Path("/nowhere"), "story")
JOB = shard_job(CONFIG, 0)


def config(**values: Any) -> GeneratorConfig:
    return GeneratorConfig.of(Path("/nowhere"), "story", **values)


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


def channels() -> list[ServerChannel]:
    # Not `isinstance`: that asks objects of other libraries for their class, and some warn about it.
    return [each for each in gc.get_objects() if type(each) is ServerChannel]


def test_a_rank_takes_the_process_that_was_started_ahead(file: int, tmp_path: Path) -> None:
    start_ahead(CONFIG, tmp_path, load=False)
    (ahead,) = _ahead.values()
    taken, told = start_rank(CONFIG, JOB, tmp_path, file, append=False)
    assert taken is ahead.process
    assert not told
    assert not _ahead
    taken.end()
    again, _ = start_rank(CONFIG, JOB, tmp_path, file, append=True)
    assert again.pid != taken.pid
    again.end()


def test_one_that_was_started_for_something_else_is_ended(file: int, tmp_path: Path) -> None:
    for other_config, job in ((config(threads=1), JOB), (CONFIG, shard_job(CONFIG, 0, num_blocks=7))):
        start_ahead(CONFIG, tmp_path)
        (ahead,) = _ahead.values()
        other, told = start_rank(other_config, job, tmp_path, file, append=False)
        assert not told
        assert other.pid != ahead.process.pid
        assert not runs(ahead.process.pid)
        other.end()


def test_what_nobody_takes_ends(tmp_path: Path) -> None:
    start_ahead(config(tensor_parallel=2), tmp_path)
    pids = [ahead.process.pid for ahead in _ahead.values()]
    assert len(pids) == 2
    assert all(ahead.job is None for ahead in _ahead.values())  # several ranks have to be told where to meet
    end_ahead()
    assert not any(runs(pid) for pid in pids)


def test_it_loads_at_once_and_what_it_says_is_heard(tmp_path: Path) -> None:
    """Here that there is no such model: it has ended when its server comes."""

    async def start() -> None:
        start_ahead(CONFIG, tmp_path)
        (ahead,) = _ahead.values()
        os.waitid(os.P_PID, ahead.process.pid, os.WEXITED | os.WNOWAIT)
        group = ShardGroup(CONFIG, ServerConfig(log_dir=tmp_path))
        try:
            with pytest.raises(StartError, match="'/nowhere' is no folder"):
                await group.start()
        finally:
            await group.close()

    asyncio.run(start())


def test_a_start_that_is_cancelled_leaves_no_error_behind(tmp_path: Path) -> None:
    """As at Ctrl+C while a model loads: asyncio would print a result that nobody has taken."""
    printed: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: printed.append(context))
        group = ShardGroup(CONFIG, ServerConfig(log_dir=tmp_path))
        start = asyncio.ensure_future(group.start())
        while not group.pids:
            await asyncio.sleep(0.001)
        (pid,) = group.pids
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert not runs(pid)
        await group.close()
        del start
        gc.collect()

    asyncio.run(main())
    assert printed == []


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
def test_a_clean_up_that_is_cancelled_too_is_finished_by_the_close(turns: int, tmp_path: Path) -> None:
    """A server that stops cancels until a start is over; no process, channel or transport stays."""
    before = [id(channel) for channel in channels()]

    async def main() -> None:
        group = ShardGroup(CONFIG, ServerConfig(log_dir=tmp_path))
        start = asyncio.ensure_future(group.start())
        while not group.pids:
            await asyncio.sleep(0)
        (pid,) = group.pids
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        await group.close()
        assert not runs(pid)
        assert not group.pids
        await asyncio.sleep(0.01)  # a transport that was being made is closed once it is there
        assert [channel for channel in channels() if id(channel) not in before and not channel.closed] == []

    uvloop.run(main())


def test_a_command_begins_the_rank_that_is_plain(file: int, tmp_path: Path) -> None:
    (tmp_path / "story.gguf").touch()
    early.begin([str(tmp_path / "story.gguf")], {})
    (begun,) = early._begun.values()
    start_ahead(CONFIG, None, load=False)
    assert not early._begun
    taken, _ = start_rank(CONFIG, JOB, None, file, append=False)
    assert taken.pid == begun.process.pid
    taken.end()
    early.begin([str(tmp_path / "story.gguf")], {})
    (left,) = early._begun.values()
    start_ahead(config(threads=2), None, load=False)  # which another environment belongs to
    early.end()
    assert not runs(left.process.pid)
    end_ahead()


def test_which_model_is_plain(tmp_path: Path) -> None:
    file, folder = str(tmp_path / "a.b.gguf"), tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).touch()
    for name in ("a.b.gguf", "part-00001-of-00002.gguf", "model.onnx"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(folder)
    assert plain_model([file], {}) == "a.b"
    assert plain_model([str(folder) + "/", "--http", "127.0.0.1:0"], {}) == "folder"
    assert plain_model([str(tmp_path / "link")], {}) == "folder"
    assert plain_model(["--name", "x", file, "--dtype=float32"], {}) == "x"
    assert plain_model([file, "--name=x"], {"HOME": "/"}) == "x"
    for unclear in (
        [],
        [str(tmp_path / "model.onnx")],
        [str(tmp_path / "none.gguf")],
        [str(tmp_path / "part-00001-of-00002.gguf")],
        ["org/name"],
        [file, str(folder)],
        [file, "--threads", "2"],
        [file, "--log-dir=logs"],
        [file, "--help"],
        ["--config", "server.toml", file],
    ):
        assert plain_model(unclear, {}) is None, unclear
    assert plain_model([file], {"INFLIGHT_THREADS": "2"}) is None
