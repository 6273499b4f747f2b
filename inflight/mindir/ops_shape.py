"""Shapes: reading, changing, joining and splitting."""

from __future__ import annotations

from inflight.mindir.emitter import Tensor, elements
from inflight.mindir.model import TensorType
from inflight.mindir.op import Op, Value, maps


def shape_of(op: Op, value: Tensor) -> Tensor:
    """The sizes as an int64 vector."""
    count = None if value.shape is None else (len(value.shape),)
    return op.graph.node("Shape", value, dtype="int64", shape=count, same=False)


def reshaped(op: Op, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A reshape to known sizes, one of which may be -1."""
    # Without allowzero a size of 0 would mean "as it was".
    return op.graph.node(
        "Reshape",
        value,
        op.graph.constant(list(sizes), "int64"),
        shape=sizes,
        allowzero=1 if 0 in sizes and -1 not in sizes else None,
    )


@maps("Reshape", "View", "ViewAs")
def _reshape(op: Op) -> Value:
    value, sizes = op.tensor(0), op.value(1, "shape")
    if op.primitive == "ViewAs":
        return op.graph.node("Reshape", value, shape_of(op, op.tensor(1)), same=False)
    if isinstance(sizes, tuple) and all(isinstance(size, int) for size in sizes):
        return reshaped(op, value, sizes)
    return op.graph.node("Reshape", value, op.to_tensor(sizes, "int64"), same=False)


@maps("Flatten")
def _flatten(op: Op) -> Value:
    return op.graph.node("Flatten", op.tensor(0), same=False, axis=1)


@maps("FlattenExt")
def _flatten_ext(op: Op) -> Value:
    value = op.tensor(0)
    if value.rank == 0:
        return reshaped(op, value, (1,))
    first = op.axis(op.integer(1, "start_dim", 0), value.rank)
    last = op.axis(op.integer(2, "end_dim", -1), value.rank)
    assert value.shape is not None
    if elements(value.shape) is not None:
        merged = elements(value.shape[first : last + 1])
        assert merged is not None
        return reshaped(op, value, (*value.shape[:first], merged, *value.shape[last + 1 :]))
    sizes = shape_of(op, value)
    parts = [_cut(op, sizes, 0, first), op.graph.constant([-1], "int64"), _cut(op, sizes, last + 1, value.rank)]
    wanted = op.graph.node("Concat", *[part for part in parts if part is not None], axis=0, same=False)
    return op.graph.node("Reshape", value, wanted, same=False)


def _cut(op: Op, vector: Tensor, start: int, end: int) -> Tensor | None:
    if start >= end:
        return None
    bounds = [op.graph.constant([bound], "int64") for bound in (start, end)]
    return op.graph.node("Slice", vector, *bounds, shape=(end - start,))


@maps("Shape", "TensorShape", "DynamicShape")
def _shape(op: Op) -> Value:
    """`Shape` gives a tuple of sizes, the other two a tensor."""
    value = op.tensor(0)
    if op.primitive != "Shape" or (isinstance(op.result, TensorType) and op.result.shape != (0,)):
        return shape_of(op, value)
    if value.shape is None:
        op.refuse("the number of dimensions of its input is unknown")
    if -1 not in value.shape:
        return tuple(value.shape)
    sizes = shape_of(op, value)
    return tuple(size if size != -1 else _element(op, sizes, axis) for axis, size in enumerate(value.shape))


def _element(op: Op, vector: Tensor, index: int) -> Tensor:
    return op.graph.node("Gather", vector, op.graph.constant(index, "int64"), axis=0, shape=())


@maps("Size")
def _size(op: Op) -> Value:
    value = op.tensor(0)
    count = None if value.shape is None else elements(value.shape)
    return count if count is not None else op.graph.node("Size", value, dtype="int64", shape=())


@maps("Rank")
def _rank(op: Op) -> Value:
    return op.tensor(0).rank


@maps("ExpandDims", "Unsqueeze")
def _expand_dims(op: Op) -> Value:
    axes = op.graph.constant(list(op.integers(1, "axis")), "int64")
    return op.graph.node("Unsqueeze", op.tensor(0), axes, same=False)


@maps("Squeeze")
def _squeeze(op: Op) -> Value:
    value = op.tensor(0)
    axes = op.integers(1, "axis", ())
    if not axes:
        if value.shape is None or -1 in value.shape:
            op.refuse("without axes the sizes of its input have to be known")
        axes = tuple(axis for axis, size in enumerate(value.shape) if size == 1)
    if not axes:
        return value
    return op.graph.node("Squeeze", value, op.graph.constant(list(axes), "int64"), same=False)


@maps("Transpose", "Permute")
def _transpose(op: Op) -> Value:
    value = op.tensor(0)
    order = [op.axis(axis, value.rank) for axis in op.integers(1, "perm")]
    return op.graph.node("Transpose", value, same=False, perm=order)


@maps("TransposeExt", "SwapAxes")
def _transpose_ext(op: Op) -> Value:
    """Two axes change places."""
    value = op.tensor(0)
    first, second = (op.axis(op.integer(index, name), value.rank) for index, name in ((1, "dim0"), (2, "dim1")))
    order = list(range(value.rank))
    order[first], order[second] = second, first
    return op.graph.node("Transpose", value, same=False, perm=order)


@maps("TExt")
def _transposed(op: Op) -> Value:
    value = op.tensor(0)
    return op.graph.node("Transpose", value, same=False, perm=list(range(value.rank))[::-1])


def _axis_argument(op: Op, name: str, position: int = 1) -> int:
    """The axis of an op that takes a tuple first, or (older files) several tensors and an attribute."""
    if name in op.attributes:
        return op.integer(len(op.inputs), name)
    return op.integer(position, name, 0)


@maps("Concat", "Cat", "SequenceConcat")
def _concat(op: Op) -> Value:
    axis = _axis_argument(op, "axis")
    return op.graph.node("Concat", *op.tensors(), same=False, axis=axis)


@maps("Stack", "Pack", "StackExt")
def _stack(op: Op) -> Value:
    axis = _axis_argument(op, "dim" if op.primitive == "StackExt" else "axis")
    where = op.graph.constant([axis], "int64")
    parts = [op.graph.node("Unsqueeze", item, where, same=False) for item in op.tensors()]
    return op.graph.node("Concat", *parts, same=False, axis=axis)


def _split(op: Op, value: Tensor, axis: int, sizes: list[int]) -> tuple[Tensor, ...]:
    parts = [(value.dtype, None)] * len(sizes)
    return tuple(op.graph.nodes("Split", [value, op.graph.constant(sizes, "int64")], parts, {"axis": axis}))


def _length(op: Op, value: Tensor, axis: int) -> int:
    if value.shape is None or value.shape[axis] == -1:
        op.refuse(f"the size of axis {axis} of its input has to be known")
    return value.shape[axis]


def _pieces(op: Op, length: int, size: int) -> list[int]:
    op.count(-(-length // max(size, 1)), "number of parts")
    return [min(size, length - start) for start in range(0, length, size)]


@maps("Split")
def _split_equal(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(1, "axis", 0)
    count = op.count(op.integer(2, "output_num", 1), "output_num")
    # A third of an open size is open too: ONNX divides by itself.
    parts = op.graph.nodes("Split", [value], [(value.dtype, None)] * count, {"axis": axis, "num_outputs": count})
    return tuple(parts)


@maps("SplitV")
def _split_sizes_attribute(op: Op) -> Value:
    value = op.tensor(0)
    axis, sizes = op.integer(2, "split_dim"), list(op.integers(1, "size_splits"))
    return _split(op, value, axis, _complete(op, value, axis, sizes))


@maps("SplitWithSize")
def _split_with_size(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(2, "dim", 0)
    return _split(op, value, axis, list(op.integers(1, "split_size")))


def _complete(op: Op, value: Tensor, axis: int, sizes: list[int]) -> list[int]:
    if -1 in sizes:
        rest = _length(op, value, axis) - sum(size for size in sizes if size != -1)
        return [rest if size == -1 else size for size in sizes]
    return sizes


@maps("SplitTensor")
def _split_tensor(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(2, "dim", 0)
    return _split(op, value, axis, _pieces(op, _length(op, value, axis), op.integer(1, "split_size")))


@maps("Chunk")
def _chunk(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(2, "dim", 0)
    length = _length(op, value, axis)
    return _split(op, value, axis, _pieces(op, length, -(-length // op.integer(1, "chunks"))))


@maps("Unstack", "Unpack", "UnstackExt")
def _unstack(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(1, "dim" if op.primitive == "UnstackExt" else "axis", 0)
    axis = op.axis(axis, value.rank)
    where = op.graph.constant([axis], "int64")
    parts = _split(op, value, axis, _pieces(op, _length(op, value, axis), 1))
    return tuple(op.graph.node("Squeeze", part, where, same=False) for part in parts)


@maps("Tile", "Repeat")
def _tile(op: Op) -> Value:
    value = op.tensor(0)
    times = op.value(1, "multiples")
    if not isinstance(times, tuple) or len(times) == value.rank:
        return op.graph.node("Tile", value, op.to_tensor(times, "int64"), same=False)
    missing = len(times) - value.rank
    if missing < 0:
        times = (1,) * -missing + times
    else:
        axes = op.graph.constant(list(range(missing)), "int64")
        value = op.graph.node("Unsqueeze", value, axes, same=False)
    return op.graph.node("Tile", value, op.to_tensor(times, "int64"), same=False)


@maps("BroadcastTo", "Expand", "ExpandAs", "DynamicBroadcastTo")
def _broadcast_to(op: Op) -> Value:
    value = op.tensor(0)
    if op.primitive == "ExpandAs":
        return op.graph.node("Expand", value, shape_of(op, op.tensor(1)), same=False)
    sizes = op.value(1, "shape")
    if isinstance(sizes, tuple):
        # -1 keeps a size; ONNX writes that as 1.
        sizes = tuple(1 if isinstance(size, int) and size == -1 else size for size in sizes)
    return op.graph.node("Expand", value, op.to_tensor(sizes, "int64"), same=False)
