"""Builds one ONNX graph: values, nodes, initializers, and the model around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from inflight.contract import Array
from inflight.mindir.model import ConversionRefused

OPSET = 20
"""ONNX 1.15: LayerNormalization, Gelu, reductions and resizes with axes; every ONNX Runtime from 1.18 runs it."""
_IR_VERSION = 9
_EXTERNAL_FROM = 1024
"""Size in bytes from which an initializer is written to the weights file, where a model is saved in two files."""
_ALIGNMENT = 64

Shape: TypeAlias = "tuple[int, ...] | None"


@dataclass(frozen=True)
class Tensor:
    """A value of the ONNX graph. A size of -1 is open; a shape of None is unknown; `()` is a scalar."""

    name: str
    dtype: str
    shape: Shape

    @property
    def rank(self) -> int:
        """Raises ConversionRefused where it is unknown."""
        if self.shape is None:
            raise ConversionRefused("a tensor's number of dimensions is unknown")
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")


def onnx_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class Emitter:
    """Collects nodes in the order in which they are emitted."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: dict[str, Array] = {}
        self._small: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}
        self._count = 0

    def _fresh(self, kind: str) -> str:
        self._count += 1
        # The colon keeps it apart from every input and output, whose names have none.
        return f"{kind}:{self._count}"

    def nodes(
        self,
        kind: str,
        inputs: Sequence[Tensor | None],
        results: Sequence[tuple[str, Shape]],
        attributes: dict[str, Any],
    ) -> list[Tensor]:
        """One node with several outputs, each given by dtype and shape. An input of None is left out."""
        outputs = [Tensor(self._fresh(kind), dtype, shape) for dtype, shape in results]
        names = [item.name if item is not None else "" for item in inputs]
        while names and not names[-1]:
            names.pop()
        present = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(kind, names, [item.name for item in outputs], **present))
        return outputs

    def node(
        self,
        kind: str,
        *inputs: Tensor | None,
        dtype: str | None = None,
        shape: Shape = None,
        same: bool = True,
        **attributes: Any,
    ) -> Tensor:
        """A new node with one output. dtype and shape default to the first input's; `same=False`: unknown shape."""
        first = inputs[0]
        if first is not None:
            dtype = dtype or first.dtype
            shape = first.shape if shape is None and same else shape
        assert dtype is not None
        return self.nodes(kind, inputs, [(dtype, shape)], attributes)[0]

    def constant(self, value: Any, dtype: str | None = None) -> Tensor:
        """An initializer; small equal ones are shared."""
        array = np.asarray(value, dtype)
        if array.nbytes >= _EXTERNAL_FROM:
            return self._weight(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._small:
            self._small[key] = self._weight(array)
        return self._small[key]

    def _weight(self, array: Array) -> Tensor:
        tensor = Tensor(self._fresh("weight"), array.dtype.name, array.shape)
        self._weights[tensor.name] = array
        return tensor

    def cast(self, value: Tensor, dtype: str) -> Tensor:
        if value.dtype == dtype:
            return value
        return self.node("Cast", value, dtype=dtype, to=onnx_type(dtype))

    def output(self, value: Tensor, name: str) -> Tensor:
        """Gives a value the name of an output."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name]))
        return Tensor(name, value.dtype, value.shape)

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in self._weights.values())

    def model(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
        """The ModelProto with the weights inside."""
        return self._model(inputs, outputs, [_inline(name, array) for name, array in self._weights.items()])

    def save(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], folder: Path, stem: str) -> Path:
        """Writes the model as two files, because a protobuf ends at 2 GB. Returns the path of the model's."""
        protos: list[Any] = []
        with (folder / f"{stem}.weights").open("wb") as file:
            for name, array in self._weights.items():
                if array.nbytes < _EXTERNAL_FROM:
                    protos.append(_inline(name, array))
                    continue
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                protos.append(_external(name, array, f"{stem}.weights", file.tell()))
                file.write(np.ascontiguousarray(_little_endian(array)).data)
        path = folder / f"{stem}.onnx"
        path.write_bytes(self._model(inputs, outputs, protos).SerializeToString())
        return path

    def _model(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: list[Any]) -> Any:
        graph = helper.make_graph(
            self._nodes,
            "mindir",
            [_value_info(item) for item in inputs],
            [_value_info(item) for item in outputs],
            weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)


def _value_info(value: Tensor) -> Any:
    # Each open size has a name of its own: nothing says that two of them are equal.
    shape: list[int | str] | None = None
    if value.shape is not None:
        shape = [size if size >= 0 else f"{value.name}_{axis}" for axis, size in enumerate(value.shape)]
    return helper.make_tensor_value_info(value.name, onnx_type(value.dtype), shape)


def _little_endian(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _inline(name: str, array: Array) -> Any:
    proto = onnx.TensorProto(name=name, data_type=onnx_type(array.dtype.name), dims=array.shape)
    proto.raw_data = _little_endian(array).tobytes()
    return proto


def _external(name: str, array: Array, location: str, offset: int) -> Any:
    proto = onnx.TensorProto(name=name, data_type=onnx_type(array.dtype.name), dims=array.shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    entries: Iterable[tuple[str, Any]] = (("location", location), ("offset", offset), ("length", array.nbytes))
    for key, value in entries:
        proto.external_data.add(key=key, value=str(value))
    return proto


def elements(shape: tuple[int, ...]) -> int | None:
    """Number of elements, or None where a size is open."""
    return None if -1 in shape else prod(shape)
