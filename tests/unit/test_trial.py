"""Whether a model file has a batch, found out by running it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from inflight.contract import Array, TensorSpec
from inflight.pipeline import examine
from inflight.runtime import GraphSpec, LoadedModel, LoadRequest
from inflight.runtime.onnx import OnnxModel
from tests.graphs import BATCHED, WHOLE


def load(data: bytes) -> OnnxModel:
    return OnnxModel.from_bytes([data], LoadRequest(files=(), device_type="cpu"))


@pytest.mark.parametrize("name", BATCHED)
def test_independent_rows_are_a_batch(name: str) -> None:
    finding = examine(load(BATCHED[name]), 32)
    assert (finding.batched, finding.reason) == (True, "")


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_are_none_are_no_batch(name: str) -> None:
    finding = examine(load(WHOLE[name]), 32)
    assert not finding.batched
    assert finding.reason


def test_the_shape_that_comes_is_the_outputs(capfd: pytest.CaptureFixture[str]) -> None:
    assert [output.shape for output in examine(load(WHOLE["mislabelled"]), 32).outputs] == [(-1, -1, -1)]
    assert [output.shape for output in examine(load(WHOLE["contradicted"]), 32).outputs] == [None]
    assert [output.shape for output in examine(load(BATCHED["dense"]), 32).outputs] == [(-1, 4)]
    assert capfd.readouterr().err == "", "ONNX Runtime writes about inputs that do not fit"


class Made(LoadedModel):
    """y = f(x) over [n, 2]."""

    device_type = "cpu"
    graphs = (GraphSpec((TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 2)),)),)

    def __init__(self) -> None:
        self.count = 0

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        self.count += 1
        return [self.of(inputs[0])]

    def of(self, x: Array) -> Array:
        return x * 2


class Counts(Made):
    """Remembers how often it ran."""

    def of(self, x: Array) -> Array:
        return x + self.count


class FromTheSeventh(Made):
    """A row depends on the one six before it."""

    def of(self, x: Array) -> Array:
        y = x.copy()
        y[6:] += x[:-6] if len(x) > 6 else 0
        return y


class Uneven(Made):
    """Sums in another order for another number of rows, as runtimes do."""

    def of(self, x: Array) -> Array:
        return np.asarray(x * 3 * (1 + 3e-6 * (len(x) - 1)), np.float32)


class ByNumber(Made):
    """The number of rows is part of the result."""

    def of(self, x: Array) -> Array:
        return x / len(x)


class Undefined(Made):
    """NaN in every row, and infinity."""

    def of(self, x: Array) -> Array:
        y = x.copy()
        y[:, 0] = np.where(x[:, 0] > 0, np.nan, np.inf)
        return y


@pytest.mark.parametrize(
    ("model", "batched"),
    [(Made, True), (Counts, False), (FromTheSeventh, False), (Uneven, True), (ByNumber, False), (Undefined, True)],
)
def test_what_a_runtime_may_do_and_what_it_may_not(model: type[Made], batched: bool) -> None:
    assert examine(model(), 32).batched is batched


def test_a_graph_of_one_row_at_a_time_needs_only_the_right_shape() -> None:
    assert examine(Counts(), 1).batched


def test_types_that_are_not_told_are_no_batch() -> None:
    model = Made()
    model.graphs = (GraphSpec((TensorSpec("x"),), (TensorSpec("y"),)),)
    assert not examine(model, 32).batched
    assert model.count == 0
