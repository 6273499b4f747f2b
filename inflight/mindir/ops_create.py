"""New tensors, casts, and the structure between primitives: tuples, scalars, aliases."""

from __future__ import annotations

import numpy as np

from inflight.mindir.emitter import Tensor
from inflight.mindir.model import Opaque
from inflight.mindir.op import Op, Value, maps
from inflight.mindir.ops_shape import shape_of

_MOST = 1 << 24
"""Elements of a constant that the converter makes."""

ALIASES = ("Load", "Depend")
"""Their first input is their result; the others only order side effects."""


@maps(
    *ALIASES, "Identity", "identity", "stop_gradient", "StopGradient", "Return", "TensorMove", "Contiguous", "Copy",
    "Clone", "ListToTuple", "TupleToList", "InsertGradientOf", "HookBackward", "ScalarUadd", "AShardIdentity",
)  # fmt: skip
def _alias(op: Op) -> Value:
    return op.value(0, "x")


@maps("MakeTuple", "MakeList")
def _make_tuple(op: Op) -> Value:
    return tuple(op.inputs)


@maps("TupleGetItem", "ListGetItem", "RealTupleGetItem", "RealListGetItem")
def _tuple_item(op: Op) -> Value:
    items = op.value(0, "tuple")
    if not isinstance(items, tuple):
        op.refuse("it takes an item of something that is no tuple")
    index = op.integer(1, "index")
    if not -len(items) <= index < len(items):
        op.refuse(f"there is no item {index} in a tuple of {len(items)}")
    return items[index]


@maps("TensorToTuple", "TensorToList")
def _tensor_to_tuple(op: Op) -> Value:
    value = op.value(0, "x")
    if not isinstance(value, Tensor):
        return op.static(0, "x")
    if value.shape is None or len(value.shape) != 1 or value.shape[0] == -1:
        op.refuse("the number of elements has to be known")
    count = op.count(value.shape[0], "number of elements")
    return tuple(
        op.graph.node("Gather", value, op.graph.constant(index, "int64"), axis=0, shape=()) for index in range(count)
    )


@maps("TupleToTensor", "ListToTensor")
def _tuple_to_tensor(op: Op) -> Value:
    return op.to_tensor(op.value(0, "x"), op.dtype)


@maps("Cast", "ScalarCast", "ScalarToTensor", "TypeAs")
def _cast(op: Op) -> Value:
    """To the dtype that the exporter inferred; how a dtype is written as an argument differs by version."""
    dtype = op.dtype
    if op.primitive == "TypeAs":
        dtype = op.tensor(1).dtype
    if dtype is None:
        op.refuse("the dtype of its result is not known")
    return op.to_tensor(op.value(0, "x"), dtype)


@maps("TensorToScalar")
def _tensor_to_scalar(op: Op) -> Value:
    value = op.value(0, "x")
    if isinstance(value, np.ndarray):
        return value.item()
    tensor = op.to_tensor(value)
    if tensor.shape == ():
        return tensor
    return op.graph.node("Reshape", tensor, op.graph.constant([], "int64"), shape=())


@maps("Dropout", "DropoutExt", "Dropout2D", "Dropout3D")
def _dropout(op: Op) -> Value:
    """Serving keeps every value; the mask belongs to training."""
    return op.tensor(0), Opaque("the mask of a dropout")


def _filled(op: Op, sizes: Tensor, value: Value, dtype: str) -> Tensor:
    fill = op.to_tensor(value, dtype)
    return op.graph.node("Expand", fill, sizes, same=False)


def _needed_dtype(op: Op, default: str | None) -> str:
    dtype = op.dtype or default
    if dtype is None:
        op.refuse("the dtype of its result is not known")
    return dtype


@maps("ZerosLike", "ZerosLikeExt", "OnesLike", "OnesLikeExt", "FullLike")
def _like(op: Op) -> Value:
    value = op.tensor(0)
    fill = op.value(1, "fill_value") if op.primitive == "FullLike" else int(op.primitive.startswith("Ones"))
    return _filled(op, shape_of(op, value), fill, _needed_dtype(op, value.dtype))


@maps("Zeros", "Ones")
def _zeros(op: Op) -> Value:
    return _filled(op, _sizes(op, 0, "shape"), int(op.primitive == "Ones"), _needed_dtype(op, "float32"))


@maps("Fill")
def _fill(op: Op) -> Value:
    """A dtype first, then shape and value."""
    return _filled(op, _sizes(op, 1, "shape"), op.value(2, "value"), _needed_dtype(op, None))


@maps("FillV2", "FillScalar", "FillTensor")
def _fill_v2(op: Op) -> Value:
    return _filled(op, _sizes(op, 0, "shape"), op.value(1, "value"), _needed_dtype(op, None))


def _sizes(op: Op, index: int, name: str) -> Tensor:
    value = op.value(index, name)
    return op.to_tensor((value,) if isinstance(value, int) else value, "int64")


@maps("Range", "Arange")
def _range(op: Op) -> Value:
    """Start, limit and step."""
    dtype = op.dtype
    if dtype is None:
        dtype = "float32" if any(isinstance(item, float) for item in op.inputs[:3]) else "int64"
    bounds = [_scalar(op, op.value(index, name), dtype) for index, name in enumerate(("start", "limit", "delta"))]
    return op.graph.node("Range", *bounds, same=False)


def _scalar(op: Op, value: Value, dtype: str) -> Tensor:
    tensor = op.to_tensor(value, dtype)
    if tensor.shape == ():
        return tensor
    return op.graph.node("Reshape", tensor, op.graph.constant([], "int64"), shape=())


@maps("LinSpace", "LinSpaceExt")
def _lin_space(op: Op) -> Value:
    start, stop = op.number(0, "start"), op.number(1, "stop")
    return op.graph.constant(
        np.linspace(start, stop, op.count(op.integer(2, "num"), "num", _MOST)), _needed_dtype(op, "float32")
    )


@maps("Eye")
def _eye(op: Op) -> Value:
    rows, columns = op.integer(0, "n"), op.integer(1, "m")
    op.count(rows * columns, "n · m", _MOST)
    return op.graph.constant(np.eye(rows, columns), _needed_dtype(op, "float32"))
