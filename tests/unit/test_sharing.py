"""What instances of one batch have in common, and what they must not: inputs without a batch dimension, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import Array, Outcome, TensorSpec, Value
from inflight.errors import InflightError
from inflight.pipeline.batcher import BatchedModel, Values
from inflight.runtime import GraphSpec, LoadedModel
from inflight.servable import ModelSpec, add_stage, declare_model, register_method
from tests.unit.pipelines import Double, Running


class Scaled(LoadedModel):
    """y = k x over [batch, 2], with one k for all; remembers its batches."""

    device_type = "cpu"

    def __init__(self, batch: int = -1, shape: tuple[int, ...] | None = ()) -> None:
        x = TensorSpec("x", "float32", (batch, 2))
        self.graphs = (GraphSpec((x, TensorSpec("k", "float32", shape)), (TensorSpec("y", "float32", (batch, 2)),)),)
        self.sizes: list[int] = []

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        self.sizes.append(len(inputs[0]))
        return [inputs[0] * inputs[1].reshape(-1)[0]]


SPEC = ModelSpec("m", ("m",), without_batch_dim_inputs=(1,))


def pair(number: int, k: float, size: int | None = None) -> list[Value]:
    return [np.array([number, 1], np.float32), np.full(() if size is None else size, k, np.float32)]


def firsts(outcomes: Sequence[Outcome]) -> list[float]:
    assert not [outcome for outcome in outcomes if isinstance(outcome, InflightError)]
    return [float(outcome[0][0]) for outcome in outcomes]  # type: ignore[index,arg-type]


@settings(max_examples=40, deadline=None)
@given(ks=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=70), batch=st.sampled_from([-1, 4]))
def test_a_shared_input_is_that_of_each_instance(ks: list[float], batch: int) -> None:
    model = Scaled(batch)
    outcomes = BatchedModel(SPEC, model).run([pair(index, k) for index, k in enumerate(ks)])
    assert firsts(outcomes) == [index * k for index, k in enumerate(ks)]
    size = 4 if batch == 4 else 32
    assert len(model.sizes) == sum(-(-ks.count(k) // size) for k in set(ks)), "equal values share runs"


def test_large_shared_inputs_that_differ_in_one_element_do_not_share_a_run() -> None:
    model = Scaled(shape=(-1,))
    rows = [pair(1, 2.0, 100_000) for _ in range(3)]
    rows[1][1][99_999] = 3  # type: ignore[index]
    rows[2][1] = rows[0][1]
    BatchedModel(SPEC, model).run(rows)
    assert sorted(model.sizes) == [1, 2]


def test_values_are_told_apart_by_type_shape_and_bytes() -> None:
    values = Values()
    arrays = [
        np.zeros(2, np.float32),
        np.zeros(2, np.int32),
        np.zeros((2, 1), np.float32),
        np.array([0.0, -0.0], np.float32),
        np.array([0.0, np.nan], np.float32),
        np.zeros(0, np.float32),
        np.array(0.0),
    ]
    numbers = [values.number(array) for array in arrays]
    assert len(set(numbers)) == len(arrays)
    assert [values.number(array.copy()) for array in arrays] == numbers


def test_runs_are_counted_as_the_model_sees_them(running: Callable[..., Running]) -> None:
    class Any2(Double):
        def __init__(self) -> None:
            super().__init__()
            self.graphs = (GraphSpec((TensorSpec("x", "float32", (-1, -1)),), (TensorSpec("y", "float32", (-1, -1)),)),)

    def one(x: Array) -> Array:
        return x

    def many(instances: Any) -> Any:
        return [x for (x,) in instances]

    def body() -> None:
        model = declare_model("any.onnx", "onnx")

        @register_method(output_names=["y"])
        def run(x: Any) -> Any:
            return add_stage(model, x, outputs_count=1)

        @register_method(output_names=["y"])
        def stages(x: Any) -> Any:
            return add_stage(many, add_stage(one, x, outputs_count=1), outputs_count=1, batch_size=4)

    server = running(body, {"any.onnx": Any2()})
    batch = [[np.ones(width, np.float32)] for width in (1, 2, 3, 4) for _ in range(4)]
    server.run("run", batch)
    sizes = [size for method, _, size in server.measured if method == "run"]
    assert sum(sizes) == 16
    assert max(sizes) <= 4, "four shapes are at least four runs"
    server.run("stages", batch[:8])
    assert [size for _, stage, size in server.measured if stage == "demo.one"] == [1] * 8
    assert sum(size for _, stage, size in server.measured if stage == "demo.many") == 8


# Edits in place


def edit(x: Array) -> Array:
    x += 5
    return x


def look(x: Array) -> Array:
    return x + 0


def edit_second(x: Array, y: Array) -> Array:
    y += 7
    return x + 0


def twice(x: Array) -> tuple[Array, Array]:
    return x, x


def edit_all_then_fail(instances: Any) -> Any:
    for (x,) in instances:
        x += 1
    for (x,) in instances:
        if x == 1:
            raise ValueError("one")
        yield x


def doubling() -> dict[str, LoadedModel]:
    return {"double.onnx": Double()}


def frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def values_of(outcome: Outcome) -> list[list[float]]:
    assert not isinstance(outcome, InflightError), outcome
    return [np.asarray(value).tolist() for value in outcome]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_reader_gets_a_value_as_it_was_produced(
    running: Callable[..., Running], freeze: bool, batch_size: int | None
) -> None:
    def edit_many(instances: Any) -> Any:
        return [edit(x) for (x,) in instances]

    def body() -> None:
        model = declare_model("double.onnx", "onnx")
        editor = edit if batch_size is None else edit_many

        @register_method(output_names=["x", "edited", "sibling", "again", "y", "of_y", "y_edited"])
        def method(x: Any) -> Any:
            edited = add_stage(editor, x, outputs_count=1, batch_size=batch_size)
            sibling = add_stage(look, x, outputs_count=1)
            again = add_stage(editor, x, outputs_count=1, batch_size=batch_size)
            y = add_stage(model, x, outputs_count=1)
            y_edited = add_stage(editor, y, outputs_count=1, batch_size=batch_size)
            return x, edited, sibling, again, y, add_stage(look, y, outputs_count=1), y_edited

    server = running(body, doubling())
    rows: list[list[Value]] = [[np.full(2, index, np.float32)] for index in range(6)]
    if freeze:
        rows = [[frozen(row[0])] for row in rows]  # type: ignore[arg-type]
    for index, outcome in enumerate(server.run("method", rows)):
        expected = [index, index + 5, index, index + 5, 2 * index, 2 * index, 2 * index + 5]
        assert values_of(outcome) == [[float(value)] * 2 for value in expected]


def test_a_value_that_is_two_inputs_or_two_outputs_is_two_values(running: Callable[..., Running]) -> None:
    def body() -> None:
        @register_method(output_names=["first", "one", "other"])
        def method(x: Any) -> Any:
            first = add_stage(edit_second, x, x, outputs_count=1)
            one, other = add_stage(twice, first, outputs_count=2)
            return first, add_stage(edit, one, outputs_count=1), other

    (outcome,) = running(body).run("method", [[np.zeros(2)]])
    assert values_of(outcome) == [[0, 0], [5, 5], [0, 0]]


def test_the_last_reader_gets_no_copy(running: Callable[..., Running]) -> None:
    given: list[Array] = []

    def note(x: Array) -> Array:
        given.append(x)
        return x

    def body() -> None:
        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(note, add_stage(note, x, outputs_count=1), outputs_count=1)

    x = np.zeros(2)
    running(body).run("method", [[x]])
    assert given[0] is x
    assert given[1] is x


def test_a_generator_that_is_called_again_gets_what_it_has_not_edited(running: Callable[..., Running]) -> None:
    def body() -> None:
        @register_method(output_names=["y"])
        def method(x: Any) -> Any:
            return add_stage(edit_all_then_fail, x, outputs_count=1, batch_size=8)

    outcomes = running(body).run("method", [[np.array(float(index))] for index in (3, 0, 4, 5)])
    assert [None if isinstance(one, InflightError) else float(one[0]) for one in outcomes] == [4, None, 5, 6]  # type: ignore[arg-type]


# One output


def one_output(result: Any, **options: Any) -> Callable[[], None]:
    def answer(x: Array) -> Any:
        return result

    def body() -> None:
        @register_method(output_names=["y"], **options)
        def method(x: Any) -> Any:
            return add_stage(answer, x, outputs_count=1, tag="the tag")

    return body


class Tensor:
    """Something that is converted."""

    def asnumpy(self) -> Array:
        return np.array([1.5, 2.5])


@pytest.mark.parametrize(
    ("result", "value"),
    [
        ((np.array([1, 2]),), [1, 2]),
        ([np.array([1, 2])], [1, 2]),
        ([Tensor()], [1.5, 2.5]),
        ((Tensor(),), [1.5, 2.5]),
        ((7,), 7),
        (([1, 2],), [1, 2]),
        ([3], [3]),
        ([[1, 2]], [[1, 2]]),
        ([1, 2], [1, 2]),
        ([np.float32(1), np.float32(2)], [1, 2]),
    ],
)
def test_one_output_is_taken_out_of_what_wraps_it(running: Callable[..., Running], result: Any, value: Any) -> None:
    (outcome,) = running(one_output(result)).run("method", [[np.zeros(1)]])
    assert values_of(outcome) == [value]


@pytest.mark.parametrize(("result", "value"), [([3], 3), ([[1, 2]], [1, 2]), ([1, 2], [1, 2]), ((3,), 3)])
def test_mindspore_serving_takes_it_out_of_every_list(running: Callable[..., Running], result: Any, value: Any) -> None:
    (outcome,) = running(one_output(result, mindspore_values=True)).run("method", [[np.zeros(1)]])
    assert values_of(outcome) == [value]


@pytest.mark.parametrize("options", [{}, {"mindspore_values": True}])
@pytest.mark.parametrize(
    ("result", "count"),
    [
        ((np.zeros(2), np.zeros(2)), 2),
        ([np.zeros(2), np.zeros(2)], 2),
        ([Tensor(), Tensor()], 2),
        ((1, 2), 2),
        ((), 0),
    ],
)
def test_two_outputs_are_not_one(
    running: Callable[..., Running], result: Any, count: int, options: dict[str, Any]
) -> None:
    (outcome,) = running(one_output(result, **options)).run("method", [[np.zeros(1)]])
    assert isinstance(outcome, InflightError)
    assert f"returned {count} outputs, expected 1 from 'demo.answer'" in str(outcome)


def test_a_list_of_texts_is_one_output_but_for_mindspores_drop_in(running: Callable[..., Running]) -> None:
    (texts,) = running(one_output(["a", "b"])).run("method", [[np.zeros(1)]])
    assert [list(value.items) for value in texts] == [["a", "b"]]
    (outcome,) = running(one_output(["a", "b"], mindspore_values=True)).run("method", [[np.zeros(1)]])
    assert isinstance(outcome, InflightError)
    assert "returned 2 outputs, expected 1" in str(outcome)
