"""Signals that are told on an event loop, whatever the main thread does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from inflight.startup import Wakeups, wait_until

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's"
)


@pytest.fixture(autouse=True)
def quiet() -> object:
    """SIGUSR1 ends no process here."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)
    assert signal.set_wakeup_fd(-1) == -1


def told(wakeups: Wakeups, *, before: bool = False, seconds: float = 5.0) -> list[int]:
    """The numbers that a loop hears of a signal that comes before it follows, or after."""
    numbers: list[int] = []

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        if before:
            os.kill(os.getpid(), signal.SIGUSR1)
        wakeups.follow(loop, lambda number: (numbers.append(number), heard.set()))
        if not before:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            await asyncio.wait_for(heard.wait(), seconds)
        except asyncio.TimeoutError:
            pass
        wakeups.leave(loop)

    asyncio.run(listen())
    return numbers


@pytest.mark.parametrize("before", [False, True])
def test_a_loop_hears_signals_since_they_were_taken(before: bool) -> None:
    wakeups = Wakeups()
    wakeups.take()
    assert told(wakeups, before=before) == [signal.SIGUSR1]
    Wakeups.give_back()


def test_one_holds_them_at_a_time() -> None:
    first, second = Wakeups(), Wakeups()
    first.take()
    second.take()
    Wakeups.give_back()  # while they are held it does nothing
    assert told(second, seconds=0.2) == []
    assert told(first)[-1] == signal.SIGUSR1
    Wakeups.give_back()


def test_somebody_elses_descriptor_stays() -> None:
    read, written = os.pipe()
    os.set_blocking(written, False)
    try:
        signal.set_wakeup_fd(written)
        wakeups = Wakeups()
        wakeups.take()
        assert told(wakeups, seconds=0.2) == []
        Wakeups.give_back()
        assert signal.set_wakeup_fd(-1) == written
        assert os.read(read, 10) == bytes([signal.SIGUSR1])
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(written)


def test_a_wait_of_the_main_thread_runs_handlers() -> None:
    ran = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: ran.set())
    over = threading.Event()

    def interrupt() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # this thread takes it: it ends no wait
        ran.wait(10)
        over.set()

    other = threading.Thread(target=interrupt)
    other.start()
    wait_until(over)
    other.join()
    assert ran.is_set()


def test_nothing_is_left_open_for_the_interpreters_end_to_complain() -> None:
    script = """
import asyncio
from inflight.startup import Wakeups
wakeups = Wakeups()
wakeups.take()
async def follow():
    loop = asyncio.get_running_loop()
    wakeups.follow(loop, print)
    wakeups.leave(loop)
asyncio.run(follow())
"""
    ended = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
