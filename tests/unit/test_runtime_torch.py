"""What only the PyTorch runtime does: telling its files apart, signatures, structured outputs, threads."""

# torch is imported where it is installed: mypy sees no types of it.
# mypy: disable-error-code="name-defined, valid-type, attr-defined"
from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from inflight.contract import TensorSpec  # noqa: E402
from inflight.errors import StartError  # noqa: E402
from inflight.pipeline import examine  # noqa: E402
from inflight.runtime import LoadRequest  # noqa: E402
from inflight.runtime.base import LoadedModel  # noqa: E402
from inflight.runtime.torch import TorchRuntime  # noqa: E402

Tensor = torch.Tensor
ONES = np.ones((2, 3), np.float32)


class InDict(torch.nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"zeta": x + 1, "alpha": x.to(torch.int64)}


class InPlace(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.add_(1), self.table, x.t()


class Half(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


class WithKeyword(torch.nn.Module):
    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return x - shift


class Optional(torch.nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0) -> list[Tensor]:
        return [x, x * scale]


class TakesList(torch.nn.Module):
    def forward(self, many: list[Tensor]) -> Tensor:
        return many[0]


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    def save(module: torch.nn.Module, name: str = "m.pt") -> Path:
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            torch.jit.script(module).save(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    def save(module: torch.nn.Module, *args: Tensor, name: str = "m.pt2", **options: object) -> Path:
        torch.export.save(torch.export.export(module, args, **options), tmp_path / "saved.pt2")
        return (tmp_path / "saved.pt2").rename(tmp_path / name)

    return save


def load(file: Path, **fields: object) -> LoadedModel:
    return TorchRuntime.load(LoadRequest(files=(file,), device_type="cpu", **fields))  # type: ignore[arg-type]


def test_a_script_names_its_inputs_and_says_no_more(script: Callable[..., Path]) -> None:
    graph = load(script(InPlace())).graphs[0]
    assert graph.inputs == (TensorSpec("x"),)
    assert graph.outputs == tuple(TensorSpec(f"output_{number}") for number in range(3))


def test_arguments_with_a_default_are_no_inputs_and_lists_are_counted_by_a_run(script: Callable[..., Path]) -> None:
    model = load(script(Optional()))
    assert model.graphs[0].inputs == (TensorSpec("x"),)
    assert model.graphs[0].outputs == ()
    np.testing.assert_array_equal(model.run([ONES])[1], 2 * ONES)


def test_a_script_that_takes_no_tensor_is_refused_by_the_argument(script: Callable[..., Path]) -> None:
    with pytest.raises(StartError, match=r"'many'.*only tensors"):
        load(script(TakesList()))


def test_an_exported_program_says_everything(export: Callable[..., Path]) -> None:
    rows = torch.export.Dim("rows", min=1, max=64)
    graph = load(export(InDict(), torch.ones(2, 3), dynamic_shapes=({0: rows},))).graphs[0]
    assert graph.inputs == (TensorSpec("x", "float32", (-1, 3)),)
    assert graph.outputs == (TensorSpec("zeta", "float32", (-1, 3)), TensorSpec("alpha", "int64", (-1, 3)))


@pytest.mark.parametrize("kind", ["script", "export"])
def test_dicts_come_out_in_their_own_order(kind: str, script: Callable[..., Path], export: Callable[..., Path]) -> None:
    model = load(script(InDict()) if kind == "script" else export(InDict(), torch.ones(2, 3)))
    zeta, alpha = model.run([ONES])
    np.testing.assert_array_equal(zeta, ONES + 1)
    assert alpha.dtype == np.int64


@pytest.mark.parametrize("kind", ["script", "export"])
def test_work_in_place_touches_neither_the_callers_arrays_nor_the_weights(
    kind: str, script: Callable[..., Path], export: Callable[..., Path]
) -> None:
    model = load(script(InPlace()) if kind == "script" else export(InPlace(), torch.ones(2, 3)))
    array = np.zeros((2, 3), np.float32)
    for _ in range(2):
        added, table, turned = model.run([array])
        np.testing.assert_array_equal(array, np.zeros((2, 3)))
        np.testing.assert_array_equal(added, ONES)
        np.testing.assert_array_equal(table, ONES)
        assert turned.shape == (3, 2)
        assert turned.flags.c_contiguous
        table[:] = 9


def test_keyword_inputs_are_given_by_position(export: Callable[..., Path]) -> None:
    model = load(export(WithKeyword(), torch.ones(2, 3), kwargs={"shift": torch.ones(2, 3)}))
    assert [spec.name for spec in model.graphs[0].inputs] == ["x", "shift"]
    np.testing.assert_array_equal(model.run([3 * ONES, ONES])[0], 2 * ONES)


def test_types_that_cannot_be_served_are_named(script: Callable[..., Path], export: Callable[..., Path]) -> None:
    with pytest.raises(StartError, match=r"'output'.*torch\.bfloat16.*float32"):
        load(export(Half(), torch.ones(2, 3)))
    model = load(script(Half()))  # a script does not say so before it runs
    with pytest.raises(TypeError, match=r"torch\.bfloat16.*float32"):
        model.run([ONES])


def test_a_file_is_known_by_its_content(script: Callable[..., Path], export: Callable[..., Path]) -> None:
    named_like_a_script = load(export(InDict(), torch.ones(2, 3), name="exported.pt"))
    named_like_an_export = load(script(InDict(), name="scripted.pt2"))
    for model in (named_like_a_script, named_like_an_export):
        np.testing.assert_array_equal(model.run([ONES])[0], ONES + 1)


def test_pickles_are_refused_without_being_opened(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "opened",))

    for name, value in (("weights.pt", InPlace().state_dict()), ("object.pt", Harmful())):
        torch.save(value, tmp_path / name)
        with pytest.raises(StartError, match=rf"{name}.*torch\.save.*torch\.jit\.save or torch\.export\.save"):
            load(tmp_path / name)
    assert not (tmp_path / "opened").exists()


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(StartError, match="not a model file of PyTorch"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize("count", [1, 2])
def test_the_threads_of_the_replica_are_set(count: int, script: Callable[..., Path]) -> None:
    load(script(InDict()), threads=count)
    assert torch.get_num_threads() == count


def test_wrong_shapes_are_refused_by_an_exported_program(export: Callable[..., Path]) -> None:
    model = load(export(InDict(), torch.ones(2, 3)))
    with pytest.raises((AssertionError, RuntimeError)):
        model.run([np.ones((2, 4), np.float32)])
    np.testing.assert_array_equal(model.run([ONES])[0], ONES + 1)


class OverRows(torch.nn.Module):
    """Each row, with the rows before it where `along` is 0."""

    def __init__(self, along: int) -> None:
        super().__init__()
        self.along = along

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(self.along)


@pytest.mark.parametrize("along", [0, 1])
def test_whether_an_exported_program_has_a_batch_is_found_out(export: Callable[..., Path], along: int) -> None:
    rows = torch.export.Dim("rows", min=1, max=64)
    model = load(export(OverRows(along), torch.ones(2, 3), dynamic_shapes=({0: rows},)))
    assert examine(model, 32).batched is (along == 1)


def test_a_script_is_served_one_request_a_call(script: Callable[..., Path]) -> None:
    assert not examine(load(script(InPlace())), 32).batched
