"""Processes of workers, with a program of the test's in place of the worker's: what they inherit and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inflight.errors import StartError
from inflight.link import create_file
from inflight.place import Launch, WorkerProcess, start_worker

LAST = "echo the last word; exit 3"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerProcess]]:
    """Starts the lines of a bash script as a worker."""
    program = tmp_path / "program"
    files = [create_file(name, 4096) for name in ("inbox", "outbox")]
    started: list[WorkerProcess] = []

    def start(script: str, log: Path | None = None, append: bool = False, **environment: str) -> WorkerProcess:
        program.write_text(f"#!/usr/bin/env bash\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        started.append(start_worker(Launch(["--label", "a b"], *files, environment, log, append)))
        return started[-1]

    yield start
    for process in started:
        if process.running:
            process.end()
        process.socket.close()
    for file in files:
        os.close(file)


async def end_of(process: WorkerProcess) -> list[int]:
    """What it is told of the end, once that has come."""
    told: list[int] = []
    process.watch(told.append)
    assert await process.ended(20)
    return told


def received(sock: socket.socket) -> bytes:
    sock.settimeout(20)
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


def test_it_inherits_the_socket_and_both_files(start: Callable[..., WorkerProcess]) -> None:
    """Under the numbers that its command line says, in a session of its own."""
    script = """
for argument; do case $argument in --fd=*) fd=${argument#--fd=};; --inbox=*) in=${argument#--inbox=};;
--outbox=*) out=${argument#--outbox=};; esac; done
{ echo "$1,$2,$3,$4"; wc -c < /dev/fd/$in; wc -c < /dev/fd/$out; echo $MINE; read line <&$fd; } >&$fd
"""
    process = start(script, MINE="yes")
    assert os.getsid(process.pid) == process.pid
    process.socket.sendall(b"go on\n")
    lines = received(process.socket).decode().split()
    assert lines[:2] == ["-m,inflight.worker,--label,a", "b"]
    assert lines[2:] == ["4096", "4096", "yes"]
    assert asyncio.run(end_of(process)) == [0]


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), (LAST, 3), ("kill -9 $$", -signal.SIGKILL), ("kill -6 $$", -signal.SIGABRT)]
)
def test_how_it_ended(start: Callable[..., WorkerProcess], script: str, status: int) -> None:
    process = start(script)
    assert process.status is None
    assert asyncio.run(end_of(process)) == [status]
    assert process.status == status
    assert not process.running
    process.kill()  # its number may belong to another by now


def test_one_that_goes_on_has_not_ended(start: Callable[..., WorkerProcess]) -> None:
    process = start("exec sleep 60")

    async def look() -> list[int]:
        told: list[int] = []
        process.watch(told.append)
        assert not await process.ended(0.01)
        assert process.running
        process.kill()
        assert await process.ended(20)
        return told

    assert asyncio.run(look()) == [-signal.SIGKILL]


def test_what_it_started_ends_with_it(start: Callable[..., WorkerProcess]) -> None:
    process = start("fd=${5#--fd=}; sleep 60 & echo started >&$fd")
    asyncio.run(end_of(process))
    assert received(process.socket) == b"started\n"  # the child held the other end until it was ended


def test_one_that_is_not_watched_is_ended_and_collected(start: Callable[..., WorkerProcess]) -> None:
    process = start("exec sleep 60")
    process.end()
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, 0)


@pytest.mark.parametrize("append", [False, True])
def test_its_log(start: Callable[..., WorkerProcess], tmp_path: Path, append: bool) -> None:
    log = tmp_path / "logs" / "worker.log"
    log.parent.mkdir()
    log.write_text("before\n")
    process = start(f"echo $# >&2; {LAST}", log, append)
    assert asyncio.run(end_of(process)) == [3]
    assert log.read_text() == ("before\n" if append else "") + "8\nthe last word\n"  # --own-log is the eighth


def test_a_program_or_a_log_that_cannot_be_had(
    start: Callable[..., WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartError, match="cannot start a worker process"):
        start("exit", tmp_path)  # a folder
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    before = len(os.listdir("/proc/self/fd"))
    inbox, outbox = (create_file(name, 4096) for name in ("inbox", "outbox"))
    with pytest.raises(StartError, match="cannot start a worker process"):
        start_worker(Launch([], inbox, outbox, {}, None, append=False))
    for file in (inbox, outbox):
        os.close(file)
    assert len(os.listdir("/proc/self/fd")) == before, "a socket is left"


def test_it_is_asked_where_its_threads_are(start: Callable[..., WorkerProcess]) -> None:
    process = start(
        'fd=${5#--fd=}; trap "echo here >&$fd; exit 5" QUIT; echo ready >&$fd; while :; do sleep 0.01; done'
    )
    assert process.socket.recv(100) == b"ready\n"
    process.dump()
    assert received(process.socket) == b"here\n"
    assert asyncio.run(end_of(process)) == [5]
    process.dump()  # nobody is there
