"""The life of one worker process: what it says last is read, how it ended is known, and it can always be ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from inflight.link import AnyMessage, Failed, Packer, Unpacker
from inflight.place import WorkerHandle, WorkerProcess
from inflight.place import handle as handle_module

WORD = Packer().frame(Failed("so long"))

SAYS = "import os, signal, sys, time; fd, word = int(sys.argv[1]), bytes.fromhex(sys.argv[2]); "
SAYS += "say = lambda n: os.write(fd, word * n); "
"""What every script here begins with: `say(n)` sends the message `WORD` n times."""

WAITS = "os.read(fd, 1 << 16); "
"""It ends when it is told anything, or when its channel ends."""


class Story:
    """What a handle tells, in order: the texts of messages, then how the process ended."""

    def __init__(self, script: str, name: str = "worker test") -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-S", "-c", SAYS + script, str(theirs.fileno()), WORD.hex()]
        self.process = WorkerProcess(
            subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True), ours
        )
        theirs.close()
        self.told: list[Any] = []
        self.over = asyncio.Event()
        self.handle = WorkerHandle(name, self.process, self._heard, self._ended)

    def _heard(self, message: AnyMessage, values: Unpacker) -> None:
        assert isinstance(message, Failed)
        self.told.append(message.text)

    def _ended(self, handle: WorkerHandle) -> None:
        assert handle is self.handle
        self.told.append((handle.status, handle.killed))
        self.over.set()

    async def heard(self, count: int) -> None:
        for _ in range(2000):
            if len(self.told) >= count:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"only {self.told}")


def runs(pid: int) -> bool:
    """Whether a process runs; a killed one may wait to be collected by init."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


def run(script: str, test: Callable[[Story], Awaitable[None]]) -> list[Any]:
    async def main() -> list[Any]:
        story = Story(script)
        try:
            await story.handle.connect()
            await test(story)
            await asyncio.wait_for(story.over.wait(), 20)
            assert not story.handle.running
            with pytest.raises(ProcessLookupError):
                os.kill(story.handle.pid, 0)
        finally:
            await story.handle.end(0)
        return story.told

    return asyncio.run(main())


async def nothing(story: Story) -> None:
    """The process ends by itself."""


def test_what_it_said_last_is_read_before_its_end() -> None:
    assert run("say(2000); sys.exit(3)", nothing) == ["so long"] * 2000 + [(3, False)]


def test_one_that_ended_before_its_channel_was_opened_is_heard() -> None:
    async def main() -> list[Any]:
        story = Story("say(2); sys.exit(4)")
        os.waitid(os.P_PID, story.process.pid, os.WEXITED | os.WNOWAIT)
        await story.handle.connect()
        await asyncio.wait_for(story.over.wait(), 20)
        return story.told

    assert asyncio.run(main()) == ["so long", "so long", (4, False)]


@pytest.mark.parametrize(("number", "killed"), [("KILL", True), ("TERM", True), ("SEGV", False), ("ABRT", False)])
def test_a_signal_from_others_is_told_from_a_crash(number: str, killed: bool) -> None:
    sent = signal.Signals[f"SIG{number}"]

    async def test(story: Story) -> None:
        await story.heard(1)
        os.kill(story.handle.pid, sent)

    assert run("say(1); " + WAITS, test) == ["so long", (-sent, killed)]


def test_one_that_this_server_kills_was_not_killed_by_others() -> None:
    async def test(story: Story) -> None:
        await story.heard(1)
        story.handle.kill()

    assert run("say(1); " + WAITS, test) == ["so long", (-signal.SIGKILL, False)]


def test_it_is_asked_to_end_first() -> None:
    async def test(story: Story) -> None:
        await story.heard(1)
        await story.handle.end(20)
        assert story.told[-1] == (7, False), "the end is told before `end` returns"

    assert run("say(1); " + WAITS + "sys.exit(7)", test) == ["so long", (7, False)]


def test_one_that_does_not_end_when_asked_is_killed() -> None:
    async def test(story: Story) -> None:
        await story.heard(1)
        await story.handle.end(0.05)

    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(1); time.sleep(60)"
    assert run(script, test) == ["so long", (-signal.SIGKILL, False)]


def test_what_it_has_started_ends_with_it() -> None:
    async def test(story: Story) -> None:
        await story.heard(1)
        children = subprocess.check_output(["ps", "-o", "pid=", "-g", str(story.handle.pid)], text=True).split()
        assert len(children) == 2
        os.kill(story.handle.pid, signal.SIGKILL)
        await asyncio.wait_for(story.over.wait(), 20)
        for pid in map(int, children):
            for _ in range(1000):
                if not runs(pid):
                    break
                await asyncio.sleep(0.01)
            else:
                raise AssertionError(f"{pid} runs on")

    assert run("os.fork() and say(1); time.sleep(60)", test) == ["so long", (-signal.SIGKILL, True)]


def test_without_its_channel_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle_module, "STOP_GRACE", 0.05)
    assert run("say(1); os.close(fd); time.sleep(60)", nothing) == ["so long", (-signal.SIGKILL, False)]


def test_a_process_that_it_leaves_behind_does_not_hide_its_end() -> None:
    """One with a session of its own holds the channel open."""
    script = "os.fork() or (os.setsid(), time.sleep(1.5), os._exit(0)); time.sleep(0.05); say(1); os._exit(5)"
    assert run(script, nothing) == ["so long", (5, False)]


def test_one_that_cannot_be_killed_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(handle_module, "KILL_TIMEOUT", 0.05)

    async def test(story: Story) -> None:
        await story.heard(1)
        with monkeypatch.context() as patched:
            patched.setattr(story.process, "kill", lambda: None)
            await story.handle.end(0)
        assert f"worker test (pid {story.handle.pid}) cannot be killed" in caplog.text
        assert story.told == ["so long"], "it has not ended"
        monkeypatch.setattr(handle_module, "KILL_TIMEOUT", 20)
        await story.handle.end(0)

    assert run("say(1); time.sleep(60)", test) == ["so long", (-signal.SIGKILL, False)]


def test_what_is_sent_after_its_end_goes_nowhere() -> None:
    async def test(story: Story) -> None:
        await asyncio.wait_for(story.over.wait(), 20)
        for _ in range(3):
            story.handle.send(Failed("anybody?"))
            story.handle.dump()
            story.handle.kill()
            await story.handle.end(1)

    assert run("sys.exit(0)", test) == [(0, False)]
