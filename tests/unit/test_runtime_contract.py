"""The contract of `inflight.runtime.base`, run over every runtime.

All cases but the MindIR ones compute the same: from x and y they answer x + y, x - y and x itself. The last one
shows a runtime that hands its caller's memory back.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inflight.errors import StartError
from inflight.runtime import LoadedModel, LoadRequest, find_runtime

MINDIR = Path(__file__).parents[1] / "data" / "mindir"
ROW = (3,)
Reference = Callable[..., list[np.ndarray]]


def three_outputs(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [x + y, x - y, x]


@dataclass(frozen=True)
class Case:
    """How to make one model, and what it computes. `batch` is the fixed batch size, or None."""

    name: str
    fmt: str
    make: Callable[[Path], Sequence[Path]]
    reference: Reference = three_outputs
    row: tuple[int, ...] = ROW
    batch: int | None = None
    target: Callable[..., Any] | None = None
    checks_shapes: bool = True

    def inputs(self, rows: int | None = None, seed: int = 0) -> list[np.ndarray]:
        generator = np.random.default_rng(seed)
        shape = (rows or self.batch or 5, *self.row)
        return [generator.normal(size=shape).astype(np.float32) for _ in range(2)]


def save_onnx(folder: Path, batch: int | str) -> Path:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *ROW])

    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("Sub", ["x", "y"], ["difference"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    graph = helper.make_graph(nodes, "g", [value("x"), value("y")], [value(n) for n in ("sum", "difference", "same")])
    file = folder / f"model_{batch}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    return file


def save_torch(folder: Path, kind: str, batch: int | None = None) -> Path:
    import torch

    class Three(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return x + y, x - y, x

    example = (torch.zeros(batch or 2, *ROW), torch.zeros(batch or 2, *ROW))
    file = folder / f"model.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "pt":
            torch.jit.trace(Three(), example).save(file)
        else:
            size = torch.export.Dim("batch", min=1, max=4096)
            shapes = ({0: size}, {0: size}) if batch is None else None
            torch.export.save(torch.export.export(Three(), example, dynamic_shapes=shapes), file)
    return file


def add_only(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [x + y]


def three_tuple(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(three_outputs(x, y))


CASES = (
    Case("onnx", "onnx", lambda folder: [save_onnx(folder, "n")]),
    Case("onnx-fixed", "onnx", lambda folder: [save_onnx(folder, 4)], batch=4),
    Case("torchscript", "torch", lambda folder: [save_torch(folder, "pt")]),
    Case("pt2", "pt2", lambda folder: [save_torch(folder, "pt2")]),
    Case("pt2-fixed", "pt2", lambda folder: [save_torch(folder, "pt2", 4)], batch=4),
    Case("mindir", "mindir", lambda _: [MINDIR / "add_dyn.mindir"], add_only, row=(2,)),
    Case("mindir-fixed", "mindir", lambda _: [MINDIR / "add.mindir"], add_only, row=(2,), batch=2),
    Case("callable", "callable", lambda _: [], target=three_tuple, checks_shapes=False),
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def request_for(case: Case, tmp_path_factory: pytest.TempPathFactory) -> LoadRequest:
    files = tuple(case.make(tmp_path_factory.mktemp("models")))
    return LoadRequest(files=files, device_type="cpu", threads=1, target=case.target)


@pytest.fixture(scope="module")
def model(case: Case, request_for: LoadRequest) -> LoadedModel:
    return find_runtime(case.fmt).load(request_for)


def check(case: Case, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    expected = case.reference(*inputs)
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.dtype == want.dtype


def test_run_answers_contiguous_arrays_in_the_models_order(case: Case, model: LoadedModel) -> None:
    inputs = case.inputs()
    outputs = model.run(inputs)
    check(case, inputs, outputs)
    assert isinstance(outputs, list)
    assert all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in outputs)


def test_the_spec_says_what_run_takes_and_answers(case: Case, model: LoadedModel) -> None:
    assert len(model.graphs) == 1
    assert model.device_type == "cpu"
    graph = model.graphs[0]
    inputs = case.inputs()
    outputs = model.run(inputs)
    for specs, arrays in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if not specs:  # the runtime cannot tell how many
            continue
        assert len(specs) == len(arrays)
        assert len({spec.name for spec in specs}) == len(specs)
        for spec, array in zip(specs, arrays, strict=True):
            assert spec.dtype in (None, array.dtype.name)
            if spec.shape is not None:
                assert len(spec.shape) == array.ndim
                assert all(size in (-1, actual) for size, actual in zip(spec.shape, array.shape, strict=True))
                assert spec.shape[0] == (case.batch or -1)


def test_an_open_batch_takes_any_number_of_rows(case: Case, model: LoadedModel) -> None:
    if case.batch is not None:
        pytest.skip("the batch is fixed")
    for rows in (1, 2, 7, 64, 1):
        inputs = case.inputs(rows, seed=rows)
        check(case, inputs, model.run(inputs))


def test_rows_do_not_depend_on_their_neighbours(case: Case, model: LoadedModel) -> None:
    whole = case.inputs(case.batch or 6)
    outputs = model.run(whole)
    changed = [array.copy() for array in whole]
    for array in changed:
        array[1:] = 1e6
    for before, after in zip(outputs, model.run(changed), strict=True):
        np.testing.assert_array_equal(before[0], after[0])


def test_inputs_are_neither_changed_nor_kept_nor_handed_back(case: Case, model: LoadedModel) -> None:
    inputs = case.inputs()
    before = [array.copy() for array in inputs]
    outputs = model.run(inputs)
    for array, copy in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    for array in inputs:
        array[:] = np.nan
    check(case, before, outputs)


def test_read_only_inputs_will_do(case: Case, model: LoadedModel) -> None:
    inputs = case.inputs()
    for array in inputs:
        array.flags.writeable = False
    check(case, inputs, model.run(inputs))


def test_the_caller_owns_the_outputs(case: Case, model: LoadedModel) -> None:
    first = case.inputs(seed=1)
    kept = model.run(first)
    second = case.inputs(seed=2)
    other = model.run(second)
    check(case, first, kept)  # a later run does not write into it
    for array in kept:
        array[:] = 0.0  # and it can be written to
    check(case, second, other)
    check(case, first, model.run(first))


def test_a_failed_run_leaves_the_model_usable(case: Case, model: LoadedModel) -> None:
    inputs = case.inputs()
    for bad in ([], inputs[:1], [*inputs, inputs[0]]):
        with pytest.raises(Exception, match=r"."):
            model.run(bad)
    if case.checks_shapes:
        with pytest.raises(Exception, match=r"."):
            model.run([np.zeros((case.batch or 2, 7, 7), np.float32), inputs[1]])
    check(case, inputs, model.run(inputs))


def test_files_are_sub_graphs_by_position(case: Case, request_for: LoadRequest) -> None:
    if not request_for.files:
        pytest.skip("no files")
    twice = find_runtime(case.fmt).load(
        LoadRequest(files=(request_for.files[0], request_for.files[0]), device_type="cpu", target=case.target)
    )
    inputs = case.inputs()
    assert len(twice.graphs) == 2
    assert twice.graphs[0] == twice.graphs[1]
    for subgraph in (0, 1):
        check(case, inputs, twice.run(inputs, subgraph=subgraph))
    with pytest.raises(IndexError):
        twice.run(inputs, subgraph=2)


def test_devices_are_listed_preferred_first_and_the_cpu_is_there(case: Case) -> None:
    devices = find_runtime(case.fmt).devices()
    assert devices == tuple(name for name in ("ascend", "gpu", "cpu") if name in devices)
    assert devices[-1] == "cpu"


def test_a_device_that_is_not_here_is_refused_with_those_that_are(case: Case, request_for: LoadRequest) -> None:
    runtime = find_runtime(case.fmt)
    for device_type in {"ascend", "gpu"} - set(runtime.devices()):
        with pytest.raises(StartError, match="cpu"):
            runtime.load(LoadRequest(files=request_for.files, device_type=device_type, target=case.target))


def test_every_listed_device_computes_the_same(case: Case, request_for: LoadRequest) -> None:
    runtime = find_runtime(case.fmt)
    for device_type in (*runtime.devices(), None):
        loaded = runtime.load(LoadRequest(files=request_for.files, device_type=device_type, target=case.target))
        inputs = case.inputs()
        check(case, inputs, loaded.run(inputs))
        assert loaded.device_type in runtime.devices()
        loaded.close()


def test_missing_and_damaged_files_are_named(case: Case, request_for: LoadRequest, tmp_path: Path) -> None:
    if not request_for.files:
        pytest.skip("no files")
    runtime = find_runtime(case.fmt)
    suffix = request_for.files[0].suffix
    missing, empty, junk = (tmp_path / f"{name}{suffix}" for name in ("missing", "empty", "junk"))
    empty.write_bytes(b"")
    junk.write_bytes(b"this is no model" * 64)
    for file in (missing, empty, junk):
        with pytest.raises(StartError, match=file.name):
            runtime.load(LoadRequest(files=(file,), device_type="cpu"))


def test_formats_and_endings_are_lower_case(case: Case) -> None:
    runtime = find_runtime(case.fmt)
    assert case.fmt in runtime.formats
    assert all(name == name.lower() for name in (*runtime.formats, *runtime.suffixes))
    assert all(name.startswith(".") for name in runtime.suffixes)


def test_importing_the_package_imports_no_back_end() -> None:
    code = (
        "import sys, inflight.runtime as r; r.available_formats(); "
        "print([m for m in ('onnx', 'onnxruntime', 'torch', 'mindspore') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
