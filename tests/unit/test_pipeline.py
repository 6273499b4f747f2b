"""Stages, batches and errors inside one worker, without a process around them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import Array, Outcome, TensorSpec, Value
from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InflightError,
    InvalidRequest,
    ModelError,
    PredictFailed,
    StartError,
)
from inflight.link import BOARD_BYTES, Board, BoardReader
from inflight.pipeline import Job, Pipeline, Submission
from inflight.pipeline.functions import Form, as_row
from inflight.runtime import GraphSpec, LoadedModel
from inflight.servable import add_stage, declare_model, register_method
from tests.unit.pipelines import Double, Running, trace


def row(a: float, b: float) -> list[Value]:
    return [np.array([a, b], np.float32)]


def pair() -> None:
    model = declare_model("double.onnx", "onnx")

    def plus_one(x: Array) -> Array:
        return x + 1

    @register_method(output_names=["y"])
    def both(x: Any) -> Any:
        first = add_stage(plus_one, x, outputs_count=1)
        return add_stage(model, first, outputs_count=1)

    @register_method(output_names=["y"])
    def plain(x: Any) -> Any:
        return add_stage(model, x, outputs_count=1)


def numbers(outcomes: Sequence[Outcome]) -> list[float]:
    assert not [outcome for outcome in outcomes if isinstance(outcome, InflightError)]
    return [float(outcome[0][0]) for outcome in outcomes]  # type: ignore[index,arg-type]


def test_stages_run_in_order_and_results_keep_theirs(running: Callable[..., Running]) -> None:
    model = Double()
    server = running(pair, {"double.onnx": model})
    assert numbers(server.run("both", [row(i, 0) for i in range(100)])) == [2 * (i + 1) for i in range(100)]
    assert max(model.sizes) <= 32


def test_waiting_instances_share_a_run(running: Callable[..., Running]) -> None:
    model = Double(delay=0.02)
    server = running(pair, {"double.onnx": model})
    server.run("plain", [row(i, 0) for i in range(65)])
    assert len(model.sizes) <= 4, model.sizes


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_short_batches_of_a_fixed_model_are_padded_and_trimmed(running: Callable[..., Running], count: int) -> None:
    model = Double(batch=4)
    server = running(pair, {"double.onnx": model})
    assert numbers(server.run("plain", [row(i, 0) for i in range(count)])) == [2.0 * i for i in range(count)]
    assert set(model.sizes) == {4}


def test_a_bad_row_fails_alone_in_its_batch(running: Callable[..., Running]) -> None:
    server = running(pair, {"double.onnx": Double(delay=0.01)})
    rows: list[list[Value]] = [row(i, 0) for i in range(10)]
    rows[3] = [np.zeros(2, np.float64)]
    rows[4] = [np.zeros(3, np.float32)]
    rows[5] = ["text"]
    rows[6] = row(-1, 0)
    outcomes = server.run("plain", rows)
    texts = {index: str(outcome) for index, outcome in enumerate(outcomes) if isinstance(outcome, InflightError)}
    assert list(texts) == [3, 4, 5, 6]
    assert "input 0 data type kMSI_Float64 not match the data type kMSI_Float32 defined in model" in texts[3]
    assert "Given model input 0 size 12 not match the size 8 defined in model" in texts[4]
    assert "data type kMSI_String not match" in texts[5]
    assert "minus one" in texts[6]
    assert isinstance(outcomes[6], PredictFailed)
    assert isinstance(outcomes[3], InvalidRequest)


def test_another_shape_of_the_same_size_is_taken(running: Callable[..., Running]) -> None:
    server = running(pair, {"double.onnx": Double()})
    assert numbers(server.run("plain", [[np.array([[3.0], [4.0]], np.float32)]])) == [6.0]


def test_without_batch_dim_inputs_are_given_once(running: Callable[..., Running]) -> None:
    class Scaled(LoadedModel):
        device_type = "cpu"
        graphs = (
            GraphSpec(
                (TensorSpec("x", "float32", (-1, 2)), TensorSpec("k", "float32", (1,))),
                (TensorSpec("y", "float32", (-1, 2)),),
            ),
        )

        def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
            assert inputs[1].shape == (1,)
            return [inputs[0] * inputs[1]]

    def body() -> None:
        model = declare_model("scaled.onnx", "onnx", without_batch_dim_inputs=1)

        @register_method(output_names=["y"])
        def scale(x: Any, k: Any) -> Any:
            return add_stage(model, x, k, outputs_count=1)

    server = running(body, {"scaled.onnx": Scaled()})
    k = np.array([3], np.float32)
    assert numbers(server.run("scale", [[*row(i, 0), k] for i in range(5)])) == [0, 3, 6, 9, 12]


def test_an_output_of_one_number_an_instance(running: Callable[..., Running]) -> None:
    class Sum(LoadedModel):
        device_type = "cpu"
        graphs = (GraphSpec((TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1,)),)),)

        def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
            return [inputs[0].sum(axis=1)]

    server = running(pair, {"double.onnx": Sum()})
    outcomes = server.run("plain", [row(i, 1) for i in range(3)])
    for index, outcome in enumerate(outcomes):
        assert not isinstance(outcome, InflightError)
        assert isinstance(outcome[0], np.ndarray)
        assert (outcome[0].shape, float(outcome[0])) == ((), index + 1)


def test_models_whose_batch_dimensions_disagree_are_refused() -> None:
    class Odd(Double):
        def __init__(self) -> None:
            super().__init__(4)
            self.graphs = (GraphSpec(self.graphs[0].inputs, (TensorSpec("y", "float32", (3, 2)),)),)

    with pytest.raises(StartError, match="different batch sizes"):
        Running(pair, {"double.onnx": Odd()})


# Python stages


def stage_of(function: Callable[..., Any], batch_size: int | None = None, outputs: int = 1) -> Callable[[], None]:
    def body() -> None:
        @register_method(output_names=[f"y{index}" for index in range(outputs)])
        def method(x: Any) -> Any:
            return add_stage(function, x, outputs_count=outputs, batch_size=batch_size)

    return body


def texts(outcomes: Sequence[Outcome]) -> list[str | None]:
    return [str(outcome) if isinstance(outcome, InflightError) else None for outcome in outcomes]


def raises_below_zero(x: Array) -> Array:
    if x < 0:
        raise ValueError("below zero")
    return x * 10


def batch_below_zero(instances: Sequence[tuple[Array]]) -> Iterator[Array]:
    for (x,) in instances:
        yield raises_below_zero(x)


def short_by_one(instances: Sequence[tuple[Array]]) -> list[Array]:
    return [x * 10 for (x,) in instances][:-1]


def leaves(x: Array) -> Array:
    raise SystemExit("bye")


def calls_a_hung_model(x: Array) -> Array:
    raise DeadlineExceeded("a model of servable 'demo' ran for more than 2 seconds")


def test_a_called_model_that_took_too_long_is_told_as_a_deadline(running: Callable[..., Running]) -> None:
    (outcome,) = running(stage_of(calls_a_hung_model)).run("method", [[np.array(1.0)]])
    assert isinstance(outcome, DeadlineExceeded)
    assert "ran for more than 2 seconds" in str(outcome)


def returns_none(x: Array) -> None:
    return None


def returns_two(x: Array) -> tuple[Array, Array]:
    return x, x


def returns_object(x: Array) -> object:
    return object()


@pytest.mark.parametrize(("function", "size"), [(raises_below_zero, None), (batch_below_zero, 8)])
@settings(max_examples=15, deadline=None)
@given(signs=st.lists(st.booleans(), min_size=1, max_size=20))
def test_an_exception_fails_its_instance_only(function: Any, size: int | None, signs: list[bool]) -> None:
    server = Running(stage_of(function, size))
    try:
        outcomes = server.run("method", [[np.array(1.0 if sign else -1.0)] for sign in signs])
    finally:
        server.close()
    for sign, outcome in zip(signs, outcomes):
        if sign:
            assert not isinstance(outcome, InflightError)
            assert outcome[0] == 10
        else:
            assert isinstance(outcome, ModelError)
            assert "stage index(begin with 1): 1, error msg: below zero" in str(outcome)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (leaves, "bye"),
        (returns_none, "returned None"),
        (returns_object, "cannot be made an array|unsupported output of type object"),
    ],
)
def test_results_that_cannot_be_used_fail_the_instance(
    running: Callable[..., Running], function: Any, text: str
) -> None:
    server = running(stage_of(function))
    for _ in range(2):  # and the worker goes on
        (outcome,) = server.run("method", [[np.array(1.0)]])
        assert isinstance(outcome, ModelError)
        assert re.search(text, str(outcome)), str(outcome)


def test_a_wrong_number_of_outputs_fails_the_instance(running: Callable[..., Running]) -> None:
    server = running(stage_of(returns_two, outputs=3))
    assert "returned 2 outputs, expected 3" in str(server.run("method", [[np.array(1.0)]])[0])


def test_too_few_results_of_a_batch_fail_the_rest(running: Callable[..., Running]) -> None:
    server = running(stage_of(short_by_one, 4))
    (outcome,) = server.run("method", [[np.array(1.0)]])
    assert "returned 0 results for 1 instances; return or yield one result for each instance" in str(outcome)


def test_scalars_texts_and_bytes_become_values() -> None:
    results: list[Any] = [True, 3, 2.5, "text", b"raw", [1, 2], np.float16(1.5), np.arange(6).reshape(2, 3).T]
    wanted = ["bool", "int64", "float64", str, bytes, "int64", "float16", "int64"]
    for result, kind in zip(results, wanted):
        (value,) = as_row(result, Form("f", 1))
        if isinstance(kind, str):
            assert isinstance(value, np.ndarray)
            assert value.dtype == kind
            assert value.flags.c_contiguous
            assert np.array_equal(value, result)
        else:
            assert type(value) is kind


BUFFER = np.zeros(3)


def same_buffer(x: Array) -> Array:
    BUFFER[:] = x
    return BUFFER


def same_buffer_yielded(instances: Sequence[tuple[Array]]) -> Iterator[Array]:
    for (x,) in instances:
        BUFFER[:] = x
        yield BUFFER


def view_of_buffer(x: Array) -> tuple[Array]:
    BUFFER[:] = x
    return (BUFFER[:2],)


@pytest.mark.parametrize(("function", "size"), [(same_buffer, None), (same_buffer_yielded, 8), (view_of_buffer, None)])
def test_a_buffer_that_is_filled_again_and_again_gives_each_its_own(
    running: Callable[..., Running], function: Any, size: int | None
) -> None:
    def body() -> None:
        model = declare_model("double.onnx", "onnx")

        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(function, x, outputs_count=1, batch_size=size)

        @register_method(output_names=["y"])
        def plain(x: Any) -> Any:
            return add_stage(model, x, outputs_count=1)

    server = running(body, {"double.onnx": Double()})
    outcomes = server.run("method", [[np.array(float(index))] for index in range(20)])
    assert numbers(outcomes) == [float(index) for index in range(20)]


def test_edits_in_place_are_seen_by_later_stages_as_mindspore_serving_has_it(running: Callable[..., Running]) -> None:
    def edit(x: Array) -> Array:
        x += 5
        return x

    def body() -> None:
        @register_method(output_names=["original", "edited"], mindspore_values=True)
        def method(x: Any) -> Any:
            return x, add_stage(edit, x, outputs_count=1)

    frozen = np.zeros(2)
    frozen.flags.writeable = False
    server = running(body)
    (outcome,) = server.run("method", [[frozen]])
    assert not isinstance(outcome, InflightError)
    assert np.array_equal(outcome[0], [5, 5])  # type: ignore[arg-type]
    assert np.array_equal(outcome[1], [5, 5])  # type: ignore[arg-type]
    assert np.array_equal(frozen, [0, 0])


def test_bytes_are_uint8_arrays_in_a_stage_and_bytes_on_the_way_out(running: Callable[..., Running]) -> None:
    def length(x: Array) -> int:
        assert isinstance(x, np.ndarray)
        assert x.dtype == np.uint8
        return len(x)

    def body() -> None:
        @register_method(output_names=["same", "n"])
        def method(x: Any) -> Any:
            return x, add_stage(length, x, outputs_count=1)

    (outcome,) = running(body).run("method", [[b"abc"]])
    assert not isinstance(outcome, InflightError)
    assert outcome[0] == b"abc"
    assert outcome[1] == 3


def test_dropped_and_late_jobs_end_without_running(running: Callable[..., Running]) -> None:
    gate = threading.Event()
    ran: list[float] = []

    def wait(x: Array) -> Array:
        ran.append(float(x))
        gate.wait(5)
        return x

    server = running(stage_of(wait))
    first, first_outcomes = server.jobs("method", [[np.array(0.0)]])
    server.pipeline.submit([first])
    while not ran:
        time.sleep(0.001)
    dropped, dropped_outcomes = server.jobs("method", [[np.array(1.0)]])
    late, late_outcomes = server.jobs("method", [[np.array(2.0)]], deadlines=[time.monotonic() - 1])
    server.pipeline.submit([dropped, late])
    dropped.submission.dropped.add(0)
    gate.set()
    deadline = time.monotonic() + 5
    while not (first_outcomes and dropped_outcomes and late_outcomes):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert isinstance(dropped_outcomes[0], Cancelled)
    assert isinstance(late_outcomes[0], DeadlineExceeded)
    assert ran == [0.0]


@pytest.mark.alone
def test_max_wait_fills_a_batch(running: Callable[..., Running]) -> None:
    model = Double(batch=4)

    def body() -> None:
        declared = declare_model("double.onnx", "onnx")

        @register_method(output_names=["y"], max_wait_ms=300)
        def patient(x: Any) -> Any:
            return add_stage(declared, x, outputs_count=1)

    server = running(body, {"double.onnx": model})
    results: list[list[Outcome]] = []
    threads = [threading.Thread(target=lambda: results.append(server.run("patient", [row(1, 1)]))) for _ in range(4)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert model.sizes == [4]
    assert time.monotonic() - start < 0.3, "a full batch does not wait for the timer"
    server.run("patient", [row(1, 1)])
    assert model.sizes == [4, 4]


def test_later_stages_go_first(running: Callable[..., Running]) -> None:
    order: list[str] = []

    def first(x: Array) -> Array:
        order.append("first")
        return x

    def second(x: Array) -> Array:
        order.append("second")
        return x

    def body() -> None:
        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(second, add_stage(first, x, outputs_count=1), outputs_count=1)

    server = running(body)
    server.run("method", [[np.array(float(i))] for i in range(3)])
    assert order == ["first", "second"] * 3


def test_methods_take_turns(running: Callable[..., Running]) -> None:
    """A method with many jobs does not keep another one's waiting until they have run."""
    gate = threading.Event()
    order: list[str] = []

    def run_many(x: Array) -> Array:
        gate.wait(20)
        order.append("many")
        return x

    def run_few(x: Array) -> Array:
        order.append("few")
        return x

    def body() -> None:
        @register_method(output_names=["y"])
        def many(x: Any) -> Any:
            return add_stage(run_many, x, outputs_count=1)

        @register_method(output_names=["y"])
        def few(x: Any) -> Any:
            return add_stage(run_few, x, outputs_count=1)

    server = running(body)
    waiting = [server.jobs(name, [[np.array(0.0)]] * count) for name, count in (("many", 200), ("few", 3))]
    for job, _ in waiting:
        server.pipeline.submit([job])
    gate.set()
    deadline = time.monotonic() + 20
    while any(len(outcomes) < len(job) for job, outcomes in waiting):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert order.index("few") <= 100
    assert len(order) == 203


def test_a_call_of_a_model_from_any_thread(running: Callable[..., Running]) -> None:
    model = Double(batch=4)
    server = running(pair, {"double.onnx": model})
    results: list[list[Outcome]] = [[]] * 5

    def call(thread: int) -> None:
        results[thread] = server.pipeline.call("double.onnx", 0, [row(thread, index) for index in range(6)])

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(5)]
    for started in threads:
        started.start()
    for started in threads:
        started.join(20)
    for thread, outcomes in enumerate(results):
        assert [np.asarray(outcome[0]).tolist() for outcome in outcomes if not isinstance(outcome, InflightError)] == [
            [2 * thread, 2 * index] for index in range(6)
        ]
    (failed,) = server.pipeline.call("double.onnx", 0, [row(-1, 0)])
    assert isinstance(failed, PredictFailed)
    for key, subgraph in (("double.onnx", 1), ("other.onnx", 0)):
        with pytest.raises(InvalidRequest, match=f"the model '{key}' has no sub-graph {subgraph}"):
            server.pipeline.call(key, subgraph, [row(1, 1)])


def test_of_failures_of_one_kind_one_is_written(
    running: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """With the user's frames and none of ours, however many instances fail."""

    class Special(Exception):
        pass

    def fails(x: Array) -> Array:
        raise Special(f"number {x}")

    with caplog.at_level("ERROR", "inflight"):
        outcomes = running(stage_of(fails)).run("method", [[np.array(float(index))] for index in range(50)])
    assert all(isinstance(outcome, ModelError) for outcome in outcomes)
    (record,) = caplog.records
    assert "number 0" in record.getMessage()
    assert "in fails" in record.getMessage()
    assert "inflight/pipeline" not in record.getMessage()


def test_what_runs_is_on_the_board() -> None:
    """The instances of a Python stage while it runs, and nothing after it."""
    memory = memoryview(bytearray(BOARD_BYTES))
    seen: list[list[int]] = []

    def look(x: Array) -> Array:
        seen.extend(run.keys for run in BoardReader(memory.toreadonly()).runs())
        return x

    spec = trace(stage_of(look)).spec()
    pipeline = Pipeline(spec, {}, lambda *measured: None, lambda: pipeline.close(), Board(memory))
    outcomes: list[Outcome] = []

    def finish(submission: Submission, keys: Sequence[int], results: Sequence[Outcome]) -> None:
        outcomes.extend(results)

    keys = range(7, 8)
    pipeline.submit([Job(Submission(spec.methods["method"], keys, finish), keys, [[[np.array(1.0)]]])])
    pipeline.run_functions()
    assert seen == [[7]]
    assert len(outcomes) == 1
    assert BoardReader(memory.toreadonly()).runs() == []
