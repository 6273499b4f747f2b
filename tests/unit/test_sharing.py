"""What instances of one batch have in common, and what they must not: inputs without a batch dimension, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.errors import InflightError
from inflight.pipeline.batcher import BatchedModel, Values
from inflight.runtime import GraphSpec, LoadedModel
from inflight.servable import ModelSpec, add_stage, declare_model, register_method
from inflight.types import Array, Outcome, TensorSpec, Value
from tests.unit.test_pipeline import Double, Running


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(body: Callable[[], None], models: dict[str, LoadedModel] | None = None) -> Running:
        made.append(Running(body, models))
        return made[-1]

    yield make
    for one in made:
        one.close()


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
