"""What only the callable runtime does: signatures of Python callables, and finding them by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.errors import StartError
from inflight.runtime import LoadRequest
from inflight.runtime.base import LoadedModel
from inflight.runtime.callable import CallableRuntime

ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def load(target: Any) -> LoadedModel:
    return CallableRuntime.load(LoadRequest(files=(), target=target))


class Scale:
    built = 0

    def __init__(self, factor: float = 2.0) -> None:
        type(self).built += 1
        self.factor = factor

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x * self.factor

    def method(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y


def with_default(x: np.ndarray, y: np.ndarray, factor: float = 2.0, *, shift: float = 1.0) -> list[np.ndarray]:
    return [x * factor, y + shift]


def any_number(*arrays: np.ndarray) -> np.ndarray:
    return np.sum(arrays, axis=0)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (with_default, ["x", "y"]),
        (lambda a: a, ["a"]),
        (Scale(3.0), ["x"]),
        (Scale(3.0).method, ["x", "y"]),
        (partial(with_default, np.zeros(1)), ["y"]),
        (any_number, []),
    ],
)
def test_inputs_are_the_parameters_that_must_be_given(target: Callable[..., Any], names: list[str]) -> None:
    graph = load(target).graphs[0]
    assert [spec.name for spec in graph.inputs] == names
    assert all(spec.dtype is None and spec.shape is None for spec in graph.inputs)
    assert graph.outputs == ()


def test_arrays_go_in_by_position_and_one_or_several_come_out() -> None:
    (one,) = load(any_number).run([ROWS, ROWS, ROWS])
    np.testing.assert_array_equal(one, 3 * ROWS)
    first, second = load(with_default).run([ROWS, ROWS])
    np.testing.assert_array_equal(first, 2 * ROWS)
    np.testing.assert_array_equal(second, ROWS + 1)
    (built_in,) = load(operator.neg).run([ROWS])
    np.testing.assert_array_equal(built_in, -ROWS)


def test_a_class_is_built_once_and_its_instance_answers() -> None:
    Scale.built = 0
    model = load(Scale)
    for _ in range(3):
        np.testing.assert_array_equal(model.run([ROWS])[0], 2 * ROWS)
    assert Scale.built == 1


def test_the_target_may_change_and_keep_what_it_is_given() -> None:
    kept: list[np.ndarray] = []

    def greedy(x: np.ndarray) -> np.ndarray:
        x += 1
        kept.append(x)
        return x.T

    model = load(greedy)
    before = ROWS.copy()
    (result,) = model.run([ROWS])
    np.testing.assert_array_equal(ROWS, before)
    assert result.flags.c_contiguous
    kept[0][:] = 0
    np.testing.assert_array_equal(result, (before + 1).T)


def test_numbers_and_lists_become_arrays() -> None:
    (flat,) = load(lambda x: float(x.sum())).run([ROWS])
    assert flat.shape == ()
    first, second = load(lambda x: ([1, 2, 3], x.shape[0])).run([ROWS])
    assert first.tolist() == [1, 2, 3]
    assert second.dtype == np.int64


@pytest.mark.parametrize("value", [None, "text", object(), ["a"], {"a": 1}, 1j])
def test_a_result_that_is_no_numeric_array_is_refused_by_its_number(value: object) -> None:
    with pytest.raises(TypeError, match="Output 1 of the callable"):
        load(lambda x: (x, value)).run([ROWS])


def test_an_exception_of_the_target_comes_through() -> None:
    def fails(x: np.ndarray) -> np.ndarray:
        raise KeyError("no such row")

    with pytest.raises(KeyError, match="no such row"):
        load(fails).run([ROWS])


def test_a_callable_is_found_by_name(tmp_path: Path) -> None:
    for name in ("numpy:negative", "numpy.linalg:norm", "operator:neg"):
        model = CallableRuntime.load(LoadRequest(files=(tmp_path / name,)))
        assert len(model.run([ROWS])) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.onnx", "package.module:attribute"),
        ("no_such_package:f", "no_such_package"),
        ("numpy:no_such_name", "no_such_name"),
        ("numpy:pi", "cannot be called"),
        (":f", "package.module:attribute"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_start_error(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=text):
        CallableRuntime.load(LoadRequest(files=(tmp_path / name,)))


def test_a_target_that_cannot_be_a_model_is_refused() -> None:
    def keyword_only(x: np.ndarray, *, mode: str) -> np.ndarray:
        return x

    with pytest.raises(StartError, match="keyword argument 'mode'"):
        load(keyword_only)
    with pytest.raises(StartError, match="cannot be called"):
        load(3)
    with pytest.raises(StartError, match="give declare_model a callable"):
        load(None)
