"""Slices, gathers, masks and padding."""

from __future__ import annotations

from typing import NamedTuple

from inflight.mindir.emitter import Tensor
from inflight.mindir.op import Op, Value, maps

_END = 2**63 - 1
_BEGIN = -(2**63) + 1


class _Cut(NamedTuple):
    """One axis of a slice; a bound may be a scalar tensor."""

    axis: int
    start: Value
    end: Value
    step: int


def _slice(op: Op, value: Tensor, cuts: list[_Cut]) -> Tensor:
    cuts = [cut for cut in cuts if (cut.start, cut.end, cut.step) != (0, _END, 1)]
    if not cuts:
        return value
    starts = op.to_tensor(tuple(cut.start for cut in cuts), "int64")
    ends = op.to_tensor(tuple(cut.end for cut in cuts), "int64")
    axes = op.graph.constant([cut.axis for cut in cuts], "int64")
    steps = op.graph.constant([cut.step for cut in cuts], "int64")
    return op.graph.node("Slice", value, starts, ends, axes, steps, same=False)


def _plus(op: Op, left: Value, right: Value) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return op.graph.node("Add", op.to_tensor(left, "int64"), op.to_tensor(right, "int64"), shape=())


def _bounds(op: Op, index: int, name: str) -> tuple[Value, ...]:
    """Bounds as a tuple of integers and scalar tensors."""
    value = op.value(index, name)
    if isinstance(value, Tensor):
        if value.shape is None or len(value.shape) != 1 or value.shape[0] == -1:
            op.refuse(f"the number of its '{name}' has to be known")
        vector = op.graph.cast(value, "int64")
        return tuple(
            op.graph.node("Gather", vector, op.graph.constant(item, "int64"), axis=0, shape=())
            for item in range(op.count(value.shape[0], name))
        )
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        return value
    return op.integers(index, name)


@maps("StridedSlice")
def _strided_slice(op: Op) -> Value:
    """Bounds for the leading axes; bits of the masks change what one position means."""
    value = op.tensor(0)
    begin, end = _bounds(op, 1, "begin"), _bounds(op, 2, "end")
    strides = op.integers(3, "strides")
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    masks = [op.integer(4 + index, name, 0) for index, name in enumerate(names)]
    open_begin, open_end, ellipsis, new_axis, shrink = masks
    cuts: list[_Cut] = []
    added: list[int] = []
    dropped: list[int] = []
    axis = 0  # of the input
    out = 0  # of the result with the dropped axes still in it
    for position, step in enumerate(strides):
        bit = 1 << position
        if ellipsis & bit:
            later = sum(1 for index in range(position + 1, len(strides)) if not new_axis & (1 << index))
            skipped = value.rank - axis - later
            axis, out = axis + skipped, out + skipped
        elif new_axis & bit:
            added.append(out)
            out += 1
        else:
            if shrink & bit:
                # The last element has no end that could be written as a number.
                last = isinstance(begin[position], int) and begin[position] == -1
                cuts.append(_Cut(axis, begin[position], _END if last else _plus(op, begin[position], 1), 1))
                dropped.append(out)
            else:
                first = 0 if step > 0 else _END
                final = _END if step > 0 else _BEGIN
                start = first if open_begin & bit else begin[position]
                stop = final if open_end & bit else end[position]
                cuts.append(_Cut(axis, start, stop, step))
            axis, out = axis + 1, out + 1
    return _drop(op, _insert(op, _slice(op, value, cuts), added), dropped)


def _insert(op: Op, value: Tensor, axes: list[int]) -> Tensor:
    return op.graph.node("Unsqueeze", value, op.graph.constant(axes, "int64"), same=False) if axes else value


def _drop(op: Op, value: Tensor, axes: list[int]) -> Tensor:
    return op.graph.node("Squeeze", value, op.graph.constant(axes, "int64"), same=False) if axes else value


@maps("Slice")
def _slice_sized(op: Op) -> Value:
    """Begin and size for each axis; a size of -1 is the rest."""
    value = op.tensor(0)
    begin, sizes = _bounds(op, 1, "begin"), _bounds(op, 2, "size")
    cuts = [
        _Cut(axis, start, _END if isinstance(size, int) and size == -1 else _plus(op, start, size), 1)
        for axis, (start, size) in enumerate(zip(begin, sizes, strict=True))
    ]
    return _slice(op, value, cuts)


@maps("SliceExt", "Narrow")
def _slice_axis(op: Op) -> Value:
    value, axis = op.tensor(0), op.integer(1, "dim")
    start = op.value(2, "start")
    if op.primitive == "Narrow":
        return _slice(op, value, [_Cut(axis, start, _plus(op, start, op.value(3, "length")), 1)])
    return _slice(op, value, [_Cut(axis, start, op.value(3, "end"), op.integer(4, "step", 1))])


@maps("SelectExt")
def _select_one(op: Op) -> Value:
    return op.graph.node("Gather", op.tensor(0), op.tensor(2, "int64"), same=False, axis=op.integer(1, "dim"))


def _indices(op: Op, index: int) -> Tensor:
    value = op.tensor(index)
    return value if value.dtype in ("int32", "int64") else op.graph.cast(value, "int64")


@maps("Gather", "GatherV2", "SparseGatherV2", "IndexSelect")
def _gather(op: Op) -> Value:
    value = op.tensor(0)
    if op.primitive == "IndexSelect":
        return op.graph.node("Gather", value, _indices(op, 2), same=False, axis=op.integer(1, "axis"))
    axis, batch = op.integer(2, "axis", 0), op.integer(3, "batch_dims", 0)
    indices = _indices(op, 1)
    if batch == 0:
        return op.graph.node("Gather", value, indices, same=False, axis=axis)
    if op.axis(axis, value.rank) != batch % max(indices.rank, 1) or batch < 0:
        op.refuse(f"batch_dims {batch} with axis {axis} is not supported, only equal ones")
    last = op.graph.constant([-1], "int64")
    pointers = op.graph.node("Unsqueeze", op.graph.cast(indices, "int64"), last, same=False)
    return op.graph.node("GatherND", value, pointers, same=False, batch_dims=batch)


@maps("Embedding", "EmbeddingLookup")
def _embedding(op: Op) -> Value:
    if op.primitive == "Embedding":
        if op.static(3, "max_norm", None) is not None:
            op.refuse("max_norm changes the weights while serving, it is not supported")
        return op.graph.node("Gather", op.tensor(1), _indices(op, 0), same=False, axis=0)
    if op.integer(2, "offset", 0) != 0:
        op.refuse("an offset is not supported")
    return op.graph.node("Gather", op.tensor(0), _indices(op, 1), same=False, axis=0)


@maps("GatherD")
def _gather_elements(op: Op) -> Value:
    return op.graph.node("GatherElements", op.tensor(0), _indices(op, 2), same=False, axis=op.integer(1, "dim"))


@maps("GatherNd")
def _gather_nd(op: Op) -> Value:
    return op.graph.node("GatherND", op.tensor(0), op.tensor(1, "int64"), same=False)


@maps("Select", "SelectV2", "Where")
def _where(op: Op) -> Value:
    left, right = op.inputs[1], op.inputs[2]
    dtype = op.dtype or op.to_tensor(right if isinstance(left, (int, float)) else left).dtype
    picks = op.to_tensor(left, dtype), op.to_tensor(right, dtype)
    return op.graph.node("Where", op.tensor(0, "bool"), *picks, dtype=dtype, same=False)


@maps("MaskedFill")
def _masked_fill(op: Op) -> Value:
    value = op.tensor(0)
    fill = op.to_tensor(op.inputs[2], value.dtype)
    return op.graph.node("Where", op.tensor(1, "bool"), fill, value, dtype=value.dtype, same=False)


@maps("Tril", "TrilExt", "Triu", "TriuExt")
def _triangle(op: Op) -> Value:
    diagonal = op.graph.constant(op.integer(1, "diagonal", 0), "int64")
    return op.graph.node("Trilu", op.tensor(0), diagonal, upper=int(op.primitive.startswith("Triu")))


@maps("ReverseV2")
def _reverse(op: Op) -> Value:
    return _slice(op, op.tensor(0), [_Cut(axis, _END, _BEGIN, -1) for axis in op.integers(1, "axis")])


def _padded(op: Op, pairs: list[tuple[int, int]], mode: str, fill: Value = 0) -> Tensor:
    """Pairs of (before, after) for each axis; negative ones cut."""
    value = op.tensor(0)
    pads = op.graph.constant([before for before, _ in pairs] + [after for _, after in pairs], "int64")
    if mode != "constant":
        return op.graph.node("Pad", value, pads, same=False, mode=mode)
    return op.graph.node("Pad", value, pads, _scalar(op, fill, value.dtype), same=False, mode=mode)


def _scalar(op: Op, value: Value, dtype: str) -> Tensor:
    tensor = op.to_tensor(0 if value is None else value, dtype)
    if tensor.shape == ():
        return tensor
    return op.graph.node("Reshape", tensor, op.graph.constant([], "int64"), shape=())


@maps("Pad", "MirrorPad")
def _pad(op: Op) -> Value:
    """Pairs for each axis, as an attribute or (MirrorPad) an input."""
    pairs = [(int(before), int(after)) for before, after in op.static(1, "paddings")]
    if op.primitive == "Pad":
        return _padded(op, pairs, "constant")
    if op.static(2, "mode", "REFLECT") not in ("REFLECT", 1):
        op.refuse("mode SYMMETRIC has no counterpart in ONNX")
    return _padded(op, pairs, "reflect")


_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "circular": "wrap"}


@maps("PadV3")
def _pad_v3(op: Op) -> Value:
    """Pairs from the last axis on."""
    mode = str(op.static(len(op.inputs), "mode", "constant")).lower()
    if mode not in _MODES:
        op.refuse(f"mode '{mode}' is not supported")
    pads = op.integers(1, "paddings")
    if not op.flag(len(op.inputs), "paddings_contiguous", True):
        half = len(pads) // 2
        pads = tuple(size for pair in zip(pads[:half], pads[half:], strict=True) for size in pair)
    return _padded(op, _from_last(op, pads), _MODES[mode], op.value(2, "constant_value", None))


@maps("ConstantPadND")
def _constant_pad(op: Op) -> Value:
    return _padded(op, _from_last(op, op.integers(1, "padding")), "constant", op.value(2, "value", 0))


@maps(*(f"{kind}Pad{axes}D" for kind in ("Reflection", "Replication") for axes in (1, 2, 3)))
def _mint_pad(op: Op) -> Value:
    mode = "reflect" if op.primitive.startswith("Reflection") else "edge"
    return _padded(op, _from_last(op, op.integers(1, "padding")), mode)


def _from_last(op: Op, pads: tuple[int, ...]) -> list[tuple[int, int]]:
    rank = op.tensor(0).rank
    given = [(pads[index], pads[index + 1]) for index in range(0, len(pads), 2)]
    return [(0, 0)] * (rank - len(given)) + given[::-1]


@maps("PixelShuffle", "DepthToSpace")
def _depth_to_space(op: Op) -> Value:
    if op.primitive == "PixelShuffle":
        size, mode = op.integer(1, "upscale_factor"), "CRD"
    else:
        size, mode = op.integer(1, "block_size"), "DCR"
    return op.graph.node("DepthToSpace", op.tensor(0), same=False, blocksize=size, mode=mode)


@maps("SpaceToDepth")
def _space_to_depth(op: Op) -> Value:
    return op.graph.node("SpaceToDepth", op.tensor(0), same=False, blocksize=op.integer(1, "block_size"))


@maps("NonZero")
def _non_zero(op: Op) -> Value:
    found = op.graph.node("NonZero", op.tensor(0), dtype="int64", same=False)
    return op.graph.node("Transpose", found, same=False, perm=[1, 0])


@maps("OneHot", "OneHotExt")
def _one_hot(op: Op) -> Value:
    """By comparison: an index outside of the range gives a row of `off`, where ONNX would count from the end."""
    indices = op.tensor(0, "int64")
    axis = op.integer(4, "axis", -1)
    where = op.graph.constant([axis], "int64")
    depth = op.to_tensor(op.value(1, "depth"), "int64")
    zero, one = op.graph.constant(0, "int64"), op.graph.constant(1, "int64")
    numbers = op.graph.node("Range", zero, _scalar(op, depth, "int64"), one, same=False)
    if axis != -1:
        behind = indices.rank - op.axis(axis, indices.rank + 1)
        column = op.graph.constant([-1] + [1] * behind, "int64")
        numbers = op.graph.node("Reshape", numbers, column, same=False)
    spread = op.graph.node("Unsqueeze", indices, where, same=False)
    hit = op.graph.node("Equal", spread, numbers, dtype="bool", same=False)
    on, off = op.tensor(2), op.tensor(3)
    return op.graph.node("Where", hit, on, off, dtype=on.dtype, same=False)
