"""`Model.call` in the stages of several instances: they share the model's batches, and one stage runs at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

from inflight.contract import Array, Outcome, Value
from inflight.errors import InflightError, ModelError
from inflight.link import BOARD_BYTES, Board, BoardReader
from inflight.pipeline import Job
from inflight.pipeline.crew import Member
from inflight.servable import Model, add_stage, declare_model, install_model_caller, register_method
from inflight.servable import model as model_module
from tests.unit.pipelines import Double, Running


class Alone:
    """Notes whether two stages ran at the same time."""

    def __init__(self) -> None:
        self.inside = 0
        self.crowded = False
        self.threads: set[int] = set()

    def __enter__(self) -> None:
        self.inside += 1
        self.threads.add(threading.get_ident())
        time.sleep(0.0002)  # the other threads get the interpreter
        self.crowded |= self.inside != 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


def calling(stage: Callable[[Model], Callable[..., Any]], batch_size: int | None = None, **options: Any) -> Any:
    """The body of a servable whose method is one function that may call the model."""

    def body() -> None:
        model = declare_model("double.onnx", "onnx", max_batch_size=8)
        function = stage(model)

        @register_method(output_names=["y"], **options)
        def method(x: Any) -> Any:
            return add_stage(function, x, outputs_count=1, batch_size=batch_size)

    return body


@pytest.fixture
def start(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Running]:
    """Starts a pipeline whose stages may use `Model.call`."""
    monkeypatch.setattr(model_module, "_installed", None)

    def begin(body: Callable[[], None], model: Double) -> Running:
        server = running(body, {"double.onnx": model})

        def call(key: str, subgraph: int, rows: Sequence[Sequence[Value]]) -> list[tuple[Value, ...]]:
            outcomes = server.pipeline.call(key, subgraph, rows)
            failed = [outcome for outcome in outcomes if isinstance(outcome, InflightError)]
            if failed:
                raise failed[0]
            return [tuple(outcome) for outcome in outcomes]  # type: ignore[arg-type]  # the errors are not among them

        install_model_caller(call, lambda key: ((1, 1),))
        return server

    return begin


def together(server: Running, values: Sequence[float]) -> list[Outcome]:
    """The outcomes of instances that came in messages of their own."""
    jobs = [server.jobs("method", [[np.array([value, 1], np.float32)]]) for value in values]
    server.pipeline.submit([job for job, _ in jobs])
    for job, outcomes in jobs:
        server.finish(job, outcomes, submitted=True)
    return [outcomes[0] for _, outcomes in jobs]


def firsts(outcomes: Sequence[Outcome]) -> list[float | None]:
    return [None if isinstance(one, InflightError) else float(np.asarray(one[0]).flat[0]) for one in outcomes]


SETTING = ContextVar("setting", default=0)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_calls_of_several_instances_share_a_batch(start: Callable[..., Running], batch_size: int | None) -> None:
    alone = Alone()

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Any) -> Any:
            with alone:
                assert SETTING.get() == 7 or not threading.current_thread().name.startswith("stages-")
                rows = [[value for (value,) in x]] if batch_size else [[x]]
            found = (
                [model.call(value) for value in rows[0]] if batch_size is None else model.call([[v] for v in rows[0]])
            )
            with alone:
                return [y + 1 for (y,) in found] if batch_size else found[0] + 1

        return function

    model = Double(delay=0.01)
    SETTING.set(7)  # as a servable_config.py may, for numpy's errors, say
    server = start(calling(stage, batch_size), model)
    together(server, range(9))  # now it is known that the function calls a model
    model.sizes.clear()
    values = list(range(40))
    assert firsts(together(server, values)) == [2 * value + 1 for value in values]
    assert sum(model.sizes) == 40
    assert max(model.sizes) == 8, model.sizes
    assert len(model.sizes) <= 12, model.sizes
    assert not alone.crowded
    assert 8 < len(alone.threads) <= 64


def test_instances_of_one_request_share_batches_too(start: Callable[..., Running]) -> None:
    model = Double(delay=0.01)
    server = start(calling(lambda model: lambda x: model.call(x)), model)
    together(server, [0.0])
    model.sizes.clear()
    outcomes = server.run("method", [[np.array([value, 1], np.float32)] for value in range(100)])
    assert firsts(outcomes) == [2 * value for value in range(100)]
    assert len(model.sizes) < 25, model.sizes


def test_a_failing_instance_fails_alone(start: Callable[..., Running]) -> None:
    """Whether its function raises before the call, after it, or its row makes the model fail."""

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Array) -> Any:
            if x[0] == 5:
                raise ValueError("five")
            y = model.call(x)
            if x[0] == 7:
                raise KeyboardInterrupt("seven")
            return y

        return function

    server = start(calling(stage), Double(delay=0.005))
    for _ in range(2):
        outcomes = together(server, [-1, *range(12)])
        assert firsts(outcomes) == [None, 0, 2, 4, 6, 8, None, 12, None, 16, 18, 20, 22]
        for index, text in ((0, "minus one"), (6, "five"), (8, "seven")):
            assert isinstance(outcomes[index], ModelError)
            assert text in str(outcomes[index])


@pytest.mark.parametrize("options", [{"exclusive": True}, {"mindspore_values": True}])
def test_an_exclusive_method_lets_nobody_in_between(start: Callable[..., Running], options: dict[str, bool]) -> None:
    alone = Alone()

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Array) -> Any:
            with alone:
                return model.call(x)

        return function

    model = Double(delay=0.002)
    server = start(calling(stage, **options), model)
    assert firsts(together(server, range(20))) == [2 * value for value in range(20)]
    assert model.sizes == [1] * 20
    assert not alone.crowded
    assert len(alone.threads) == 1


@pytest.mark.parametrize("most", [1, 2, 64])
def test_whatever_the_number_of_threads_nobody_waits_for_ever(start: Callable[..., Running], most: int) -> None:
    """Stages that call several times, next to stages that do not, through threads of their own as well."""

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Array) -> Any:
            if int(x[0]) % 3 == 0:
                return x * 8
            if int(x[0]) % 3 == 1:
                return model.call(model.call(model.call(x)))
            found: list[Array] = []
            thread = threading.Thread(target=lambda: found.append(model.call(model.call(x))))
            thread.start()
            thread.join()
            return found[0] * 2

        return function

    server = start(calling(stage), Double(delay=0.001))
    server.pipeline._crew._most = most
    for _ in range(3):
        assert firsts(together(server, range(60))) == [8 * value for value in range(60)]
    assert server.pipeline._crew._count <= most


class Slow(list[Any]):
    """Keys whose reader is held until the other part's are read too, or for a moment."""

    read = 0

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        Slow.read += 1
        for _ in range(20):
            if Slow.read == 2:
                return
            time.sleep(0.01)


def test_parts_of_a_call_that_end_at_the_same_time_end_it_once(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a model that several threads run; a stage that got the turn twice would run beside another one."""

    def stage(model: Model) -> Callable[..., Any]:
        return lambda x: model.call([[x], [x]])[1][0]

    server = start(calling(stage), Double())
    monkeypatch.setattr(Slow, "read", 0)
    ended: list[Member] = []
    answered, submit = server.pipeline._crew.answered, server.pipeline.submit

    def end(member: Member) -> None:
        ended.append(member)
        if len(ended) == 1:
            answered(member)

    def put(jobs: Sequence[Job]) -> None:
        if not jobs[0].method.hidden:
            submit(jobs)
            return
        one = jobs[0].submission
        threads = [
            threading.Thread(target=one.finish, args=(one, Slow([key]), [[np.array([8, 1], np.float32)]]))
            for key in one.keys
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    monkeypatch.setattr(server.pipeline._crew, "answered", end)
    monkeypatch.setattr(server.pipeline, "submit", put)
    assert firsts(together(server, [4])) == [8]
    assert len(ended) == 1


def test_a_stage_may_fill_the_same_buffer_for_every_call(start: Callable[..., Running]) -> None:
    buffer = np.zeros(2, np.float32)

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Array) -> Any:
            buffer[:] = x
            return model.call(buffer)

        return function

    server = start(calling(stage), Double(delay=0.002))
    together(server, range(9))
    assert firsts(together(server, range(30))) == [2 * value for value in range(30)]


def test_stages_that_do_not_overlap_have_one_thread(start: Callable[..., Running]) -> None:
    """The one that called `run_functions`: user code may hold what belongs to a thread."""
    seen: set[int] = set()

    def stage(model: Model) -> Callable[..., Any]:
        def function(x: Array) -> Any:
            y = model.call(x)
            seen.add(threading.get_ident())
            return y

        return function

    server = start(calling(stage), Double())
    for value in range(10):
        assert firsts(together(server, [value])) == [2 * value]
    assert seen == {server._thread.ident}


def test_a_lane_that_waits_for_a_fuller_batch_is_taken_when_its_time_is_over(start: Callable[..., Running]) -> None:
    sizes: list[int] = []

    def stage(model: Model) -> Callable[..., Any]:
        def function(instances: Any) -> Any:
            sizes.append(len(instances))
            return [y for (y,) in model.call([[x] for (x,) in instances])]

        return function

    server = start(calling(stage, 8, max_wait_ms=50), Double(delay=0.02))
    first, late = (server.jobs("method", [[np.array([value, 1], np.float32)]] * 3) for value in (1, 2))
    began = time.monotonic()
    server.pipeline.submit([first[0]])
    time.sleep(0.06)  # the first three are in their call, and the turn is free
    server.pipeline.submit([late[0]])
    for job, outcomes in (first, late):
        server.finish(job, outcomes, submitted=True)
    assert sizes == [3, 3]
    assert 0.1 <= time.monotonic() - began < 5


def test_a_model_that_calls_itself_is_told_so(running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    class Itself(Double):
        def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
            return [np.asarray(outcome[0]) for outcome in server.pipeline.call("double.onnx", 0, [[inputs[0][0]]])]

    server = running(calling(lambda model: lambda x: x), {"double.onnx": Itself()})
    (failed,) = server.pipeline.call("double.onnx", 0, [[np.ones(2, np.float32)]])
    assert "the model 'double.onnx' calls itself" in str(failed)


def test_the_run_of_a_model_names_the_instances_whose_stages_called(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the server knows whose time it is: one of two models hangs, and only its callers are late."""
    memory = memoryview(bytearray(BOARD_BYTES))
    monkeypatch.setattr("inflight.pipeline.pipeline.Board", lambda: Board(memory))
    gate, entered = threading.Event(), threading.Event()

    class Held(Double):
        def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
            entered.set()
            gate.wait(20)
            return super().run(inputs)

    server = start(calling(lambda model: lambda x: model.call(x)), Held())
    job, outcomes = server.jobs("method", [[np.array([value, 1], np.float32)] for value in range(3)])
    first = Job(job.submission, job.keys[1:2], [rows[1:2] for rows in job.slots])
    server.pipeline.submit([first])
    assert entered.wait(20)
    runs = BoardReader(memory).runs()
    assert sorted((run.waiting, run.keys) for run in runs) == [(False, [1]), (True, [1])]
    gate.set()
    server.pipeline.submit([job.part(0, 1), job.part(2, 3)])
    server.finish(job, outcomes, submitted=True)
