"""Writes small MindIR files by hand, in the style of MindSpore 2.10 (arguments are constant inputs) or 2.0
(arguments are attributes of the primitive)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from inflight.mindir import ConvertedGraph, convert, read_mindir
from inflight.proto import mind_ir_reader_pb2 as pb

Style = Literal["inputs", "attributes"]

CODES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
}
TensorKind = tuple[str, tuple[int, ...]]
"""dtype and dims."""
NONE, MONAD = 25, 23
SCALARS = {bool: (9, "i", "ints"), int: (7, "i", "ints"), float: (1, "f", "floats"), str: (8, "s", "strings")}


def fill_attribute(attribute: pb.Attribute, value: Any, inside: bool = False) -> None:
    """Writes a value as MindSpore does: a scalar inside a tuple goes to the repeated field."""
    if value is None:
        attribute.type = NONE
    elif isinstance(value, (bool, int, float, str)):
        kind = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))
        number, single, repeated = SCALARS[kind]
        attribute.type = number
        stored = value.encode() if isinstance(value, str) else value if isinstance(value, float) else int(value)
        getattr(attribute, repeated).append(stored) if inside else setattr(attribute, single, stored)
    elif isinstance(value, np.ndarray):
        attribute.type = 19
        fill_tensor(attribute.tensors.add(), value)
    else:
        attribute.type = 20
        for item in value:
            fill_attribute(attribute.values.add(), item, inside=True)


def fill_tensor(tensor: pb.Tensor, array: np.ndarray) -> None:
    tensor.dims.extend(array.shape)
    tensor.data_type = CODES[array.dtype.name]
    tensor.raw_data = array.tobytes()


def fill_kind(tensor: pb.Tensor, kind: TensorKind) -> None:
    tensor.data_type = CODES[kind[0]]
    tensor.dims.extend(kind[1])


class Builder:
    """One MindIR model; the methods return names to be used as inputs of later calls."""

    def __init__(self, style: Style = "inputs") -> None:
        self.style = style
        self.model = pb.Model(model_version="2.10.0" if style == "inputs" else "2.0.0", little_endian=True)
        self.model.graph.name = "g"
        self._count = 0

    def _name(self, base: str) -> str:
        self._count += 1
        return f"g:{base}:{self._count}"

    def input(self, dtype: str, dims: Sequence[int], name: str = "x") -> str:
        port = self.model.graph.input.add(name=name if ":" in name else f"g_{len(self.model.graph.input)}:{name}")
        fill_kind(port.tensor.add(), (dtype, tuple(dims)))
        return str(port.name)

    def parameter(self, array: np.ndarray) -> str:
        tensor = self.model.graph.parameter.add(name=self._name("weight"))
        fill_tensor(tensor, array)
        return str(tensor.name)

    def constant(self, value: Any) -> str:
        node = self.model.graph.node.add(op_type="Constant", output=[self._name("value")])
        fill_attribute(node.attribute.add(name="value"), value)
        return str(node.output[0])

    def monad(self) -> str:
        node = self.model.graph.node.add(op_type="Constant", output=[self._name("monad")])
        node.attribute.add(name="value", type=MONAD)
        return str(node.output[0])

    def call(
        self,
        primitive: str,
        *inputs: str,
        result: TensorKind | Sequence[TensorKind] | None = None,
        **attributes: Any,
    ) -> str:
        kind = self.model.primitives.add(name=f"{primitive}:{self._count}", op_type=primitive)
        for name, value in attributes.items():
            fill_attribute(kind.attribute.add(name=name), value)
        output = self._name(primitive)
        node = self.model.graph.node.add(op_type=f"REF::{kind.name}", input=inputs, output=[output])
        if isinstance(result, tuple):
            shape = node.attribute.add(name="shape", type=19)
            fill_kind(shape.tensors.add(), result)
        elif result is not None:
            shape = node.attribute.add(name="shape", type=20)
            for item in result:
                fill_kind(shape.values.add(type=19).tensors.add(), item)
        return output

    def output(self, name: str, kind: TensorKind | None = None) -> None:
        port = self.model.graph.output.add(name=name)
        if kind is not None:
            fill_kind(port.tensor.add(), kind)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.model.SerializeToString())
        return path


class Arg:
    """An argument: a constant input in new files, an attribute in old ones."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


class Const:
    """A constant input in both."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Tuple:
    """A tuple of tensors."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays


def run_model(data: bytes, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    session = ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def convert_built(builder: Builder, folder: Path) -> ConvertedGraph:
    return convert(read_mindir(builder.write(folder / "m.mindir")))


def run_primitive(
    folder: Path,
    primitive: str,
    items: Sequence[np.ndarray | Arg | Const | Tuple],
    expected: Sequence[np.ndarray],
    style: Style = "inputs",
    open_sizes: bool = False,
    typed: bool = True,
    unused: int = 0,
    **attributes: Any,
) -> list[np.ndarray]:
    """Results of one primitive, run by ONNX Runtime.

    Args:
        open_sizes: every dimension of every input and result is written as -1.
        typed: the node says what results it has, as exported files do.
        unused: further results, which nobody takes.
        attributes: attributes of the primitive in both styles.
    """
    builder = Builder(style)
    arrays: list[np.ndarray] = []

    def add(array: np.ndarray) -> str:
        arrays.append(array)
        return builder.input(array.dtype.name, [-1] * array.ndim if open_sizes else array.shape)

    names: list[str] = []
    for item in items:
        if isinstance(item, np.ndarray):
            names.append(add(item))
        elif isinstance(item, Tuple):
            names.append(builder.call("MakeTuple", *[add(array) for array in item.arrays]))
        elif isinstance(item, Const) or style == "inputs":
            names.append(builder.constant(item.value))
        else:
            attributes[item.name] = item.value
    kinds = [(item.dtype.name, (-1,) * item.ndim if open_sizes else item.shape) for item in expected]
    if len(kinds) == 1 and not unused:
        builder.output(builder.call(primitive, *names, result=kinds[0] if typed else None, **attributes))
    else:
        all_kinds = [*kinds, *[("float32", (1,))] * unused]
        made = builder.call(primitive, *names, result=all_kinds if typed else None, **attributes)
        for index in range(len(kinds)):
            builder.output(builder.call("TupleGetItem", made, builder.constant(index)))
    return run_model(convert_built(builder, folder).to_bytes(), arrays)


def check_primitive(
    folder: Path,
    primitive: str,
    items: Sequence[np.ndarray | Arg | Const | Tuple],
    *expected: np.ndarray,
    styles: Sequence[Style] = ("inputs", "attributes"),
    open_sizes: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **options: Any,
) -> None:
    """Asserts values, dtypes and shapes, in both styles, with known and (where it may work) with open sizes."""
    runs = [(style, False) for style in styles] + ([(styles[0], True)] if open_sizes else [])
    for style, opened in runs:
        results = run_primitive(folder, primitive, items, expected, style, opened, **options)
        assert len(results) == len(expected)
        for result, wanted in zip(results, expected, strict=True):
            assert result.dtype == wanted.dtype, (primitive, style, opened)
            assert result.shape == wanted.shape, (primitive, style, opened)
            np.testing.assert_allclose(result, wanted, rtol, atol, err_msg=f"{primitive} {style} open={opened}")
