"""What the converter does not do: refused by name, with a text that says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inflight.errors import StartError
from inflight.mindir import ConversionRefused, convert, read_mindir, supported_primitives
from inflight.runtime import LoadRequest
from inflight.runtime.mindir import MindIRRuntime
from inflight.runtime.mindspore import is_installed
from tests.unit.mindir_builder import Builder, convert_built, run_model

DATA = Path(__file__).parents[1] / "data" / "mindir"

# What the networks that the converter is made for are built of.
LENET = "Conv2D MaxPool ReLU Flatten MatMul BiasAdd"
RESNET = "Conv2D BatchNorm ReLU Add MaxPool ReduceMean Flatten MatMul BiasAdd"
BERT = (
    "MatMul BatchMatMul BiasAdd Add Sub Mul Muls Div Divs Reshape Transpose LayerNorm Softmax Gather ExpandDims Erf "
    "Cast StridedSlice Tanh Shape Range ScalarToTensor TensorToScalar GeLU"
)
TRANSFORMER = "MatMul MatMulExt BiasAdd Add Div Reshape Transpose Split LayerNorm Softmax ReLU"
MOBILENET = "ReLU6 HSwish HSigmoid DepthwiseConv2dNative AdaptiveAvgPool2D AvgPool Mul"
YOLO = (
    "SiLU Sigmoid Concat ResizeNearestNeighbor ResizeNearestNeighborV2 ResizeBilinearV2 Split Stack Exp Pad Maximum "
    "Slice"
)
MINT = (
    "Adds Subs AddExt SubExt MatMulExt BmmExt Dense Conv2DExt Convolution LayerNormExt SumExt MeanExt ProdExt "
    "ArgMaxExt TransposeExt FlattenExt SliceExt StackExt SplitTensor SplitWithSize GeluExt LeakyReLUExt EluExt "
    "SoftplusExt AvgPool2D AdaptiveAvgPool2DExt UpsampleNearest2D UpsampleBilinear2D ConstantPadND TopkExt MaxDim"
)
STRUCTURE = "Load Depend UpdateState MakeTuple TupleGetItem"


def test_enough_primitives_have_a_mapping() -> None:
    known = set(supported_primitives())
    assert len(known) >= 100
    for names in (LENET, RESNET, BERT, TRANSFORMER, MOBILENET, YOLO, MINT, STRUCTURE):
        assert set(names.split()) <= known


def test_all_unknown_primitives_are_named_at_once(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (2,))
    first = builder.call("Zeta", x)
    second = builder.call("LSTM", first)
    builder.output(builder.call("CTCGreedyDecoder", second))
    with pytest.raises(ConversionRefused, match=r"no ONNX mapping: CTCGreedyDecoder, LSTM, Zeta$"):
        convert_built(builder, tmp_path)


@pytest.mark.skipif(is_installed(), reason="MindSpore takes the model over")
@pytest.mark.parametrize(
    ("name", "reason"), [("lstm", "no ONNX mapping: LSTM"), ("control_flow", r"control flow or calls \(5 sub-graphs\)")]
)
def test_without_mindspore_the_text_says_how_to_get_it(name: str, reason: str) -> None:
    with pytest.raises(StartError, match=rf"'{name}.mindir' cannot .*{reason}.*inflight-serving\[mindspore\]"):
        MindIRRuntime.load(LoadRequest(files=(DATA / f"{name}.mindir",), device_type="cpu"))


@pytest.mark.parametrize("name", ["tp_rank0", "tp_rank1"])
def test_shards_are_refused_whether_mindspore_is_there_or_not(name: str) -> None:
    with pytest.raises(StartError, match=r"one shard of a distributed model.*AllReduce.*export the whole model"):
        MindIRRuntime.load(LoadRequest(files=(DATA / f"{name}.mindir",), device_type="cpu"))
    with pytest.raises(ConversionRefused, match="AllReduce"):
        convert(read_mindir(DATA / f"{name}.mindir"))


def test_writing_to_a_parameter_is_refused(tmp_path: Path) -> None:
    """The write hangs on the result by a side effect only; without it later answers would differ."""
    builder = Builder()
    x, weight = builder.input("float32", (2,)), builder.parameter(np.zeros(2, np.float32))
    monad = builder.monad()
    loaded = builder.call("Load", weight, monad)
    total = builder.call("Add", x, loaded)
    state = builder.call("UpdateState", monad, builder.call("Assign", weight, total, monad))
    builder.output(builder.call("Depend", total, state))
    with pytest.raises(ConversionRefused, match="no ONNX mapping: Assign"):
        convert_built(builder, tmp_path)


def test_side_effects_without_effect_are_left_out(tmp_path: Path) -> None:
    builder = Builder()
    x, weight = builder.input("float32", (2,)), builder.parameter(np.array([1, 2], np.float32))
    monad = builder.monad()
    loaded = builder.call("Load", weight, monad)
    total = builder.call("Add", x, loaded)
    state = builder.call("UpdateState", monad, builder.call("MakeTuple", loaded, builder.call("Print", total, monad)))
    builder.output(builder.call("Depend", total, state))
    data = np.array([10, 20], np.float32)
    assert run_model(convert_built(builder, tmp_path).to_bytes(), [data])[0].tolist() == [11, 22]


def test_results_that_only_training_has_are_refused(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (2, 3))
    parameters = [builder.parameter(np.ones(3, np.float32)) for _ in range(2)]
    arguments = [builder.constant(value) for value in (-1, -1, 1e-5)]
    kinds = [("float32", (2, 3)), ("float32", (2, 1)), ("float32", (2, 1))]
    made = builder.call("LayerNorm", x, *parameters, *arguments, result=kinds)
    mean = builder.call("TupleGetItem", made, builder.constant(1))
    builder.output(builder.call("Neg", mean))
    with pytest.raises(ConversionRefused, match="result 1 of LayerNorm"):
        convert_built(builder, tmp_path)


def test_what_onnx_runtime_cannot_run_is_refused(tmp_path: Path) -> None:
    """The exporter's word on shapes is taken; where it is wrong, the model is not served."""
    builder = Builder()
    x, y = builder.input("float32", (2, 3)), builder.input("float32", (5,))
    builder.output(builder.call("Add", x, y, result=("float32", (2, 3))))
    file = builder.write(tmp_path / "odd.mindir")
    with pytest.raises(StartError, match=r"'odd.mindir' was converted, but does not run"):
        MindIRRuntime.load(LoadRequest(files=(file,), device_type="cpu"))


def test_an_input_without_numbers_is_refused(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (2,))
    builder.model.graph.input[0].tensor[0].data_type = 8  # text
    builder.output(builder.call("Neg", x))
    with pytest.raises(ConversionRefused, match="input 'x' is no tensor of numbers"):
        convert_built(builder, tmp_path)


def test_a_missing_device_is_not_blamed_on_the_file() -> None:
    if "ascend" in MindIRRuntime.devices():
        pytest.skip("there is an NPU")
    with pytest.raises(StartError, match="device type 'ascend'"):
        MindIRRuntime.load(LoadRequest(files=(DATA / "add.mindir",), device_type="ascend"))
