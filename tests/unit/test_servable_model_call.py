"""Model.call: the forms of its arguments, the shape of its results, and its error texts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.errors import InvalidRequest, ModelError, PredictFailed, Unavailable
from inflight.servable import Model, declare_model, install_model_caller, register_method, tracing
from inflight.servable import model as model_module

COUNTS = {"add.onnx": ((2, 1),), "split.onnx": ((1, 2),), "a;b": ((2, 1), (1, 2)), "free": ((-1, 1),)}
Rows = list[tuple[np.ndarray[Any, Any], ...]]


class Worker:
    """Adds, or repeats, what it is given, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, Rows]] = []
        self.failure: Exception | None = None

    def __call__(self, key: str, subgraph: int, instances: Rows) -> Rows:
        self.seen.append((key, subgraph, instances))
        if self.failure is not None:
            raise self.failure
        outputs = COUNTS[key][subgraph][1]
        return [(sum(row[1:], row[0]),) * outputs for row in instances]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(model_module, "_installed", None)
    installed = Worker()
    install_model_caller(installed, COUNTS.get)
    return installed


X = np.ones((2, 2), np.float32)


def test_one_instance_gives_its_output(worker: Worker) -> None:
    result = Model("add.onnx").call(X, X * 2)
    np.testing.assert_array_equal(result, X * 3)
    assert worker.seen[0][:2] == ("add.onnx", 0)
    assert len(worker.seen[0][2]) == 1


def test_one_instance_of_several_outputs_gives_a_tuple(worker: Worker) -> None:
    result = Model("split.onnx").call(X)
    assert isinstance(result, tuple)
    assert len(result) == 2
    np.testing.assert_array_equal(result[1], X)


@pytest.mark.parametrize("form", [list, tuple])
def test_many_instances_give_a_tuple_of_tuples(worker: Worker, form: Any) -> None:
    rows = form(form((X * index, X)) for index in range(40))
    result = Model("add.onnx").call(rows)
    assert isinstance(result, tuple)
    assert [type(row) for row in result] == [tuple] * 40
    np.testing.assert_array_equal(result[7][0], X * 8)
    assert len(worker.seen) == 1, "splitting into batches is the model's business"


def test_one_instance_in_a_list_stays_a_list(worker: Worker) -> None:
    assert len(Model("split.onnx").call([[X]])[0]) == 2


def test_sub_graphs_are_chosen_by_number(worker: Worker) -> None:
    assert len(Model("a;b").call(X, subgraph=1)) == 2
    assert worker.seen[0][:2] == ("a;b", 1)


def test_inputs_become_contiguous_arrays(worker: Worker) -> None:
    class Tensor:
        def asnumpy(self) -> Any:
            return X

    Model("free").call(X.T[::2], 1, 2.0, True, np.float16(3), Tensor())
    arrays = worker.seen[0][2][0]
    assert all(array.flags.c_contiguous for array in arrays)
    assert [str(array.dtype) for array in arrays] == ["float32", "int64", "float64", "bool", "float16", "float32"]
    assert [array.shape for array in arrays] == [(1, 2), (), (), (), (), (2, 2)]


ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("add.onnx", (), {}, "Model(add.onnx).call() failed: no inputs provided"),
    ("add.onnx", ([],), {}, "Model(add.onnx).call() failed: Input instances count is 0"),
    ("add.onnx", ((),), {}, "Model(add.onnx).call() failed: Input instances count is 0"),
    ("add.onnx", ([X, X],), {}, "Model(add.onnx).call() failed: inputs format invalid"),
    (
        "add.onnx",
        ([[]],),
        {},
        "The inputs count 0 of instance 0 is not equal to the inputs count 2 of the model",
    ),
    (
        "add.onnx",
        ([[X, X], [X, X, X]],),
        {},
        "The inputs count 3 of instance 1 is not equal to the inputs count 2 of the model",
    ),
    ("add.onnx", (X,), {}, "Model(add.onnx).call() failed: The inputs count 1 of instance 0"),
    ("other", (X,), {}, "Model(other).call() failed: the model is not declared"),
    (
        "add.onnx",
        (X, X),
        {"subgraph": 1},
        "Model(add.onnx, subgraph=1).call() failed: The model does not have subgraph of index 1, "
        "the subgraph count of the model is 1",
    ),
    ("add.onnx", (X,), {"subgraph": -1}, "Parameter 'subgraph' should be >= 0"),
    ("add.onnx", (X,), {"subgraph": "0"}, "Parameter 'subgraph' should be int, but actually <class 'str'>"),
    ("add.onnx", (X, "text"), {}, "Model(add.onnx).call() failed: a model takes numbers"),
    ("add.onnx", (X, None), {}, "Model(add.onnx).call() failed: a model takes numbers"),
    ("add.onnx", ([[X, [[1], [1, 2]]]],), {}, "Model(add.onnx).call() failed: "),
]


@pytest.mark.parametrize(("key", "args", "options", "text"), ERRORS)
def test_a_wrong_call_says_what_is_wrong(
    worker: Worker, key: str, args: tuple[Any, ...], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(RuntimeError) as failure:
        Model(key).call(*args, **options)
    assert text in str(failure.value)
    assert worker.seen == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (InvalidRequest("Given model input 0 size 4 not match the size 16 defined in model"), InvalidRequest),
        (PredictFailed("Predict Failed"), PredictFailed),
        (Unavailable("gone"), Unavailable),
        (RuntimeError("broken"), ModelError),
    ],
)
def test_what_the_model_raises_keeps_its_kind_and_text(
    worker: Worker, failure: RuntimeError, kind: type[Exception]
) -> None:
    worker.failure = failure
    with pytest.raises(kind) as raised:
        Model("add.onnx").call(X, X)
    assert str(raised.value) == f"Model(add.onnx).call() failed: {failure}"
    assert type(raised.value) is kind


def test_without_a_worker_there_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_installed", None)
    with pytest.raises(ModelError, match="works only in stage functions"):
        Model("add.onnx").call(X)


def test_the_body_of_a_method_cannot_call_a_model(worker: Worker, tmp_path: Path) -> None:
    with tracing("add", tmp_path / "add"):
        model = declare_model("add.onnx")
        with pytest.raises(ModelError, match="use add_stage there"):

            @register_method("y")
            def predict(x: Any, y: Any) -> Any:
                return model.call(x, y)


def test_every_thread_of_the_worker_may_call(worker: Worker) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(Model("add.onnx").call(X, X))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [result.tolist() for result in results] == [(X * 2).tolist()] * 4
