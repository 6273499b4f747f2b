"""What only the ONNX runtime does: providers, threads, external data, types of the file."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from inflight.contract import TensorSpec
from inflight.errors import StartError
from inflight.runtime import LoadRequest
from inflight.runtime import onnx as onnx_runtime
from inflight.runtime.onnx import OnnxModel, OnnxRuntime


def proto(
    shape: list[int | str | None] | None,
    kind: int = TensorProto.FLOAT,
    op: str = "Identity",
    weight: np.ndarray | None = None,
) -> onnx.ModelProto:
    """y = op(x), or y = op(x, weight)."""
    inputs = ["x"] if weight is None else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape if weight is None else None)],
        initializer=[] if weight is None else [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def load(*models: onnx.ModelProto, **fields: object) -> OnnxModel:
    request = LoadRequest(files=(), device_type="cpu", **fields)  # type: ignore[arg-type]
    return OnnxModel.from_bytes([model.SerializeToString() for model in models], request)


@pytest.mark.parametrize("name", sorted(onnx_runtime._DTYPES.values()))
def test_every_numeric_type_goes_in_and_out(name: str) -> None:
    model = load(proto(["n", 2], helper.np_dtype_to_tensor_dtype(np.dtype(name))))
    assert model.graphs[0].inputs == (TensorSpec("x", name, (-1, 2)),)
    assert model.graphs[0].outputs == (TensorSpec("y", name, (-1, 2)),)
    array = np.array([[0, 1], [1, 0]], name)
    (got,) = model.run([array])
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype


@pytest.mark.parametrize(
    ("kind", "text"),
    [(TensorProto.BFLOAT16, r"bfloat16.*cast"), (TensorProto.STRING, r"string.*Python stage")],
)
def test_other_types_are_refused_by_name(kind: int, text: str) -> None:
    with pytest.raises(StartError, match=f"'x'.*{text}"):
        load(proto([2], kind))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [([2, 3], (2, 3)), (["n", 3], (-1, 3)), ([None, "m"], (-1, -1)), ([], ()), (None, None)],
)
def test_shapes_are_read_from_the_file(
    shape: list[int | str | None] | None, expected: tuple[int, ...] | None, tmp_path: Path
) -> None:
    model = proto(shape)
    assert load(model).graphs[0].inputs[0].shape == expected
    onnx.save(model, tmp_path / "m.onnx")
    assert OnnxRuntime.load(LoadRequest(files=(tmp_path / "m.onnx",))).graphs[0].inputs[0].shape == expected


def test_a_weight_beside_the_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.arange(1024, dtype=np.float32)
    file = tmp_path / "m.onnx"
    onnx.save_model(
        proto([2, 1024], op="Mul", weight=weight), file, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    assert (tmp_path / "w.bin").stat().st_size >= weight.nbytes
    monkeypatch.chdir(Path(__file__).parent)
    model = OnnxRuntime.load(LoadRequest(files=(file,), device_type="cpu"))
    np.testing.assert_array_equal(model.run([np.ones((2, 1024), np.float32)])[0], np.stack([weight, weight]))


def test_a_model_that_cannot_run_its_own_shapes_fails_at_load_and_not_at_the_first_request() -> None:
    broken = proto([2, 3], op="Reshape", weight=np.array([7], np.int64))
    with pytest.raises(StartError, match="zeros"):
        load(broken)


def test_an_open_model_that_needs_more_than_a_row_of_zeros_is_served() -> None:
    needs_four = proto(["n", 2], op="Reshape", weight=np.array([2, 4], np.int64))
    model = load(needs_four)
    assert model.run([np.zeros((4, 2), np.float32)])[0].shape == (2, 4)
    with pytest.raises(Exception, match="Reshape"):
        model.run([np.zeros((3, 2), np.float32)])


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_a_provider_may_be_named_in_any_way(name: str) -> None:
    model = load(proto([2]), options={"provider": name})
    assert model.device_type == "cpu"


def test_providers_that_are_not_here_are_refused_with_those_that_are() -> None:
    with pytest.raises(StartError, match=r"'tpu' is not known.*CPU"):
        load(proto([2]), options={"provider": "tpu"})
    absent = set(ort.get_all_providers()) - set(ort.get_available_providers())
    for name in absent:
        with pytest.raises(StartError, match=r"not part of the installed build.*CPU"):
            load(proto([2]), options={"provider": name})


def test_options_go_to_the_provider_and_those_of_mindspore_do_not() -> None:
    request = LoadRequest(
        files=(),
        device_id=3,
        options={"provider": "x", "precision_mode": "fp16", "input_format": "ND", "arena_extend_strategy": "a"},
    )
    options = onnx_runtime._provider_options
    assert options(request, "CUDAExecutionProvider") == {"device_id": "3", "arena_extend_strategy": "a"}
    assert options(request, "CPUExecutionProvider") == {"arena_extend_strategy": "a"}
    assert options(request, "CANNExecutionProvider") == {
        "device_id": "3",
        "precision_mode": "fp16",
        "arena_extend_strategy": "a",
    }


def test_devices_need_both_the_hardware_and_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    build = ["CUDAExecutionProvider", "MIGraphXExecutionProvider", "CANNExecutionProvider", "CPUExecutionProvider"]

    def machine(nvidia: bool, amd: bool, ascend: bool) -> tuple[str, ...]:
        monkeypatch.setattr(onnx_runtime, "has_nvidia", lambda: nvidia)
        monkeypatch.setattr(onnx_runtime, "has_amd", lambda: amd)
        monkeypatch.setattr(onnx_runtime, "has_ascend", lambda: ascend)
        return OnnxRuntime.devices()

    assert machine(True, True, True) == tuple(
        name for name in ("gpu", "cpu") if name == "cpu" or _can("CUDA") or _can("MIGraphX") or _can("ROCM")
    )
    monkeypatch.setattr(ort, "get_available_providers", lambda: build)
    assert machine(True, False, True) == ("ascend", "gpu", "cpu")
    assert machine(False, True, False) == ("gpu", "cpu")
    assert onnx_runtime._device_providers()["gpu"] == "MIGraphXExecutionProvider"
    assert machine(True, True, False) == ("gpu", "cpu")
    assert onnx_runtime._device_providers()["gpu"] == "CUDAExecutionProvider"
    assert machine(False, False, False) == ("cpu",)


def _can(provider: str) -> bool:
    return f"{provider}ExecutionProvider" in ort.get_available_providers()


def test_a_provider_that_is_silently_dropped_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropped:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Dropped)
    monkeypatch.setattr(onnx_runtime, "has_nvidia", lambda: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(StartError, match="could not start its provider CUDA"):
        OnnxModel.from_bytes([b""], LoadRequest(files=(), device_type="gpu"))


def test_a_config_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    onnx.save(proto([2]), file)
    with pytest.raises(StartError, match="no config_file"):
        OnnxRuntime.load(LoadRequest(files=(file,), config_file=tmp_path / "c.cfg"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_replica_starts_no_more_threads_than_it_was_given() -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    model = proto([64, 64], op="MatMul", weight=np.eye(64, dtype=np.float32))
    before = threads()
    alone = load(model, threads=1)
    assert threads() == before
    three = load(model, threads=3)
    assert threads() == before + 2  # the caller is the third
    for loaded in (alone, three):
        loaded.run([np.ones((64, 64), np.float32)])
    assert threads() == before + 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads the thread's CPU time")
def test_idle_threads_do_not_spin() -> None:
    import time

    model = load(proto([256, 256], op="MatMul", weight=np.eye(256, dtype=np.float32)), threads=2)
    array = np.ones((256, 256), np.float32)
    model.run([array])
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.15
