"""What a worker writes down of its runs, and when its server takes it for hung."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from inflight.link import BOARD_BYTES, Board, BoardReader, Runner, ToldBoard
from inflight.link import board as board_module
from inflight.router import watch
from inflight.router.request import Instance, Late, Request
from inflight.router.watch import ExecutionWatch

LIMIT = 0.4


class Watched:
    """A worker's board and the watch over it; method 0 has a limit, method 1 has none."""

    def __init__(self, told: ToldBoard | None = None) -> None:
        memory = memoryview(bytearray(BOARD_BYTES))
        self.board = Board(memory)
        self.found: list[Late] = []
        self.instances = {key: self.instance(int(key > 90)) for key in (*range(1, 9), 91)}
        self.watch = ExecutionWatch(
            told or BoardReader(memory.toreadonly()), {0: LIMIT, 1: None}, self.instances, self.found.append
        )

    @staticmethod
    def instance(method: int) -> Instance:
        return Request(method, [[]], None, lambda request, result: None).instances[0]

    def after(self, seconds: float) -> list[Late]:
        async def wait() -> None:
            self.watch.arm()
            end = time.monotonic() + seconds
            while time.monotonic() < end and not self.found:
                await asyncio.sleep(0.02)
            self.watch.close()

        asyncio.run(wait())
        return self.found


def quick_runs(runner: Runner, ended: threading.Event) -> None:
    while not ended.is_set():
        runner.begin([3, 4])
        time.sleep(0.001)
        runner.end()


def began(act: Callable[[Runner], object]) -> Watched:
    watched = Watched()
    act(watched.board.runner())
    return watched


def test_a_run_that_does_not_end_is_late_with_its_instances() -> None:
    assert began(lambda runner: runner.begin([5, 6])).after(20) == [Late((5, 6), LIMIT)]


def test_of_a_run_in_parts_the_present_one_is_late() -> None:
    watched = began(lambda runner: (runner.begin([5, 6, 7, 8]), runner.at(2, 3)))
    assert watched.after(20) == [Late((7,), LIMIT)]


def test_what_ends_or_waits_or_has_no_limit_is_not_late() -> None:
    watched = Watched()
    waiting, patient, quick = (watched.board.runner() for _ in range(3))
    waiting.begin([1])
    waiting.wait()
    patient.begin([91])
    ended = threading.Event()
    thread = threading.Thread(target=quick_runs, args=(quick, ended))
    thread.start()
    assert watched.after(3 * LIMIT) == []
    ended.set()
    thread.join()


def test_time_goes_on_after_a_wait() -> None:
    watched = began(lambda runner: (runner.begin([1]), runner.wait(), runner.resume()))
    assert watched.after(20) == [Late((1,), LIMIT)]


def test_a_model_that_a_stage_called_is_late_for_the_stages_instances() -> None:
    watched = Watched()
    stage, model = watched.board.runner(), watched.board.runner()
    stage.begin([2])
    stage.wait()
    model.begin([0])
    assert watched.after(20) == [Late((2,), LIMIT)]


def test_a_worker_that_runs_nothing_of_what_it_has_is_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STUCK", 0.0)
    watched = Watched()
    watched.watch._limits = {0: LIMIT}
    (late,) = watched.after(20)
    assert late.keys == ()


def test_a_batch_larger_than_a_part_of_the_board_is_cut() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    board, reader = Board(memory), BoardReader(memory)
    first, second = board.runner(), board.runner()
    first.begin(list(range(1, 10_001)))
    second.begin([20_000])
    runs = reader.runs()
    assert runs[0].keys == list(range(1, len(runs[0].keys) + 1))
    assert 4000 < len(runs[0].keys) < 10_000
    assert runs[1].keys == [20_000]
    first.end()
    assert [run.keys for run in reader.runs()] == [[20_000]]


def test_what_a_worker_on_another_machine_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that it tells is late as one that is read from shared memory; when it is silent all may be to blame, but
    not before the longest run may have ended."""
    monkeypatch.setattr(watch, "SILENT", 0.0)
    monkeypatch.setattr(board_module, "FRESH_SECONDS", 0.1)

    def after(seconds: float, runs: list[tuple[float, bool, list[int]]], until: float) -> list[Late]:
        told = ToldBoard()
        watched = Watched(told)
        watched.watch._limits = {0: LIMIT, 1: 10 * LIMIT}
        watched.watch._longest = 2 * LIMIT
        began, ended = time.monotonic(), threading.Event()

        def tell() -> None:
            while (now := time.monotonic() - began) < until and not ended.is_set():
                told.tell([(age + now, waits, keys) for age, waits, keys in runs])
                time.sleep(0.02)

        thread = threading.Thread(target=tell)
        thread.start()
        found = watched.after(seconds)
        ended.set()
        thread.join()
        return found

    assert after(20, [(0.0, False, [5, 6]), (0.0, True, [7])], 20) == [Late((5, 6), LIMIT)]
    assert after(4 * LIMIT, [(0.0, False, [91])], 20) == []
    assert after(4 * LIMIT, [], 20) == []
    assert after(1.5 * LIMIT, [(0.0, False, [5])], 0.3 * LIMIT) == [], "its silence is no run of instance 5"
    (late,) = after(20, [], 0.3 * LIMIT)
    assert late == Late((*range(1, 9), 91), 2 * LIMIT)
