"""Mappings of shapes, slices, gathers, padding, creation and casts, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.mindir import ConversionRefused
from tests.unit.mindir_builder import (
    Arg,
    Builder,
    Const,
    Tuple,
    check_primitive,
    convert_built,
    run_model,
    run_primitive,
)

MODERN: dict[str, Any] = {"styles": ("inputs",)}
OLD: dict[str, Any] = {"styles": ("attributes",)}
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
INDEX = np.array([[2, 0], [1, 1]], np.int32)


def test_reshapes(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Reshape", [X, Const((4, -1))], X.reshape(4, -1))
    check_primitive(tmp_path, "View", [X, Const((6, 4))], X.reshape(6, 4))
    check_primitive(tmp_path, "Flatten", [X], X.reshape(2, 12))
    check_primitive(tmp_path, "FlattenExt", [X, Const(1), Const(-1)], X.reshape(2, 12))
    check_primitive(tmp_path, "FlattenExt", [X, Const(0), Const(1)], X.reshape(6, 4))
    check_primitive(tmp_path, "ExpandDims", [X, Const(1)], X[:, None])
    check_primitive(tmp_path, "ExpandDims", [X, Const(-1)], X[..., None])
    single = X[:, :1]
    check_primitive(tmp_path, "Squeeze", [single, Arg("axis", (1,))], single[:, 0])
    check_primitive(tmp_path, "Squeeze", [single, Arg("axis", ())], single[:, 0], open_sizes=False)


def test_a_shape_as_an_input_tensor(tmp_path: Path) -> None:
    sizes = np.array([6, 4], np.int32)
    check_primitive(tmp_path, "Reshape", [X, sizes], X.reshape(6, 4), open_sizes=False)


def test_transposes(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Transpose", [X, Const((2, 0, 1))], X.transpose(2, 0, 1))
    check_primitive(tmp_path, "TransposeExt", [X, Const(0), Const(-1)], X.swapaxes(0, -1))
    check_primitive(tmp_path, "TransposeExtView", [X, Const(0), Const(-1)], X.swapaxes(0, -1))
    check_primitive(tmp_path, "TExt", [X[0]], X[0].T)


def test_joining(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Concat", [Tuple(X, X + 1), Arg("axis", -1)], np.concatenate([X, X + 1], -1))
    check_primitive(tmp_path, "Concat", [X, X + 1], np.concatenate([X, X + 1], 1), axis=1, **OLD)
    check_primitive(tmp_path, "Stack", [Tuple(X, X + 1), Arg("axis", 1)], np.stack([X, X + 1], 1))
    check_primitive(tmp_path, "StackExt", [Tuple(X, X + 1), Arg("dim", -1)], np.stack([X, X + 1], -1))


def test_splitting(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Split", [X, Arg("axis", 2), Arg("output_num", 2)], *np.split(X, 2, 2))
    sizes = [X, Arg("size_splits", (1, -1)), Arg("split_dim", 2)]
    check_primitive(tmp_path, "SplitV", sizes, X[..., :1], X[..., 1:], open_sizes=False)
    check_primitive(tmp_path, "SplitWithSize", [X, Const((1, 3)), Const(2)], X[..., :1], X[..., 1:])
    check_primitive(tmp_path, "SplitTensor", [X, Const(2), Const(1)], X[:, :2], X[:, 2:], open_sizes=False)
    check_primitive(tmp_path, "Chunk", [X, Const(2), Const(1)], X[:, :2], X[:, 2:], open_sizes=False)
    check_primitive(
        tmp_path, "Unstack", [X, Arg("axis", 1), Arg("num", 3)], *(X[:, i] for i in range(3)), open_sizes=False
    )


def test_repeating(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Tile", [X, Const((1, 2, 3))], np.tile(X, (1, 2, 3)))
    check_primitive(tmp_path, "Tile", [X, Const((2, 1, 1, 1))], np.tile(X, (2, 1, 1, 1)))
    single = X[:, :1]
    check_primitive(
        tmp_path, "BroadcastTo", [single, Arg("shape", (5, -1, 3, -1))], np.broadcast_to(single, (5, 2, 3, 4))
    )


STRIDED: list[tuple[str, Any, tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, int]]] = [
    ("plain", np.s_[0:2, 1:3], (0, 1), (2, 3), (1, 1), {}),
    ("steps", np.s_[:, ::2, 3:0:-2], (0, 0, 3), (2, 3, 0), (1, 2, -2), {}),
    ("masks", np.s_[:, 1:], (9, 1), (9, 9), (1, 1), {"begin_mask": 1, "end_mask": 3}),
    ("backward", np.s_[::-1], (0,), (0,), (-1,), {"begin_mask": 1, "end_mask": 1}),
    ("shrink", np.s_[1, :, -1], (1, 0, -1), (2, 3, 0), (1, 1, 1), {"shrink_axis_mask": 5, "end_mask": 2}),
    ("new axis", np.s_[None, 0:1], (0, 0), (1, 1), (1, 1), {"new_axis_mask": 1}),
    ("ellipsis", np.s_[..., 1:3], (0, 1), (0, 3), (1, 1), {"ellipsis_mask": 1}),
    (
        "all at once",
        np.s_[0, ..., None, 2],
        (0, 0, 0, 2),
        (1, 0, 0, 3),
        (1, 1, 1, 1),
        {"shrink_axis_mask": 9, "ellipsis_mask": 2, "new_axis_mask": 4},
    ),
]


@pytest.mark.parametrize(
    ("key", "begin", "end", "steps", "masks"), [item[1:] for item in STRIDED], ids=[i[0] for i in STRIDED]
)
def test_strided_slice(
    tmp_path: Path,
    key: Any,
    begin: tuple[int, ...],
    end: tuple[int, ...],
    steps: tuple[int, ...],
    masks: dict[str, int],
) -> None:
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    arguments = [Arg(name, masks.get(name, 0)) for name in names]
    items = [X, Const(begin), Const(end), Const(steps), *arguments]
    check_primitive(tmp_path, "StridedSlice", items, X[key])


def test_slices(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Slice", [X, Const((0, 1, 0)), Const((2, 1, -1))], X[:, 1:2])
    check_primitive(tmp_path, "SliceExt", [X, Const(2), Const(1), Const(4), Const(2)], X[..., 1:4:2])
    check_primitive(tmp_path, "Narrow", [X, Const(1), Const(1), Const(2)], X[:, 1:3])
    check_primitive(tmp_path, "SelectExt", [X, Const(1), Const(2)], X[:, 2])
    check_primitive(tmp_path, "ReverseV2", [X, Arg("axis", (0, 2))], X[::-1, :, ::-1])


def test_gathers(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Gather", [X, INDEX, Const(1), Arg("batch_dims", 0)], X.take(INDEX, 1))
    batched = np.stack([X[i].take(INDEX[i], 0) for i in range(2)])
    check_primitive(tmp_path, "Gather", [X, INDEX, Const(1), Arg("batch_dims", 1)], batched)
    check_primitive(tmp_path, "IndexSelect", [X, Const(1), INDEX[0]], X.take(INDEX[0], 1))
    table = X.reshape(6, 4)
    arguments = [Const(None), Const(None), Const(2.0), Const(False)]
    check_primitive(tmp_path, "Embedding", [INDEX, table, *arguments], table[INDEX])
    where = np.array([[[2, 0, 1, 1]], [[0, 0, 2, 1]]], np.int32)
    check_primitive(tmp_path, "GatherD", [X, Const(1), where], np.take_along_axis(X, where.astype(int), 1))
    check_primitive(tmp_path, "GatherNd", [X, np.array([[1, 2], [0, 0]], np.int32)], X[[1, 0], [2, 0]])


def test_choices(tmp_path: Path) -> None:
    mask = X % 2 == 0
    check_primitive(tmp_path, "Select", [mask, X, -X], np.where(mask, X, -X))
    check_primitive(tmp_path, "Select", [mask, X, Const(0.5)], np.where(mask, X, np.float32(0.5)))
    check_primitive(tmp_path, "MaskedFill", [X, mask, Const(-1.0)], np.where(mask, np.float32(-1), X))
    check_primitive(tmp_path, "Tril", [X, Arg("diagonal", 1)], np.tril(X, 1))
    check_primitive(tmp_path, "Triu", [X, Arg("diagonal", -1)], np.triu(X, -1))
    flags = np.array([[1, 0], [0, 1]], bool)
    check_primitive(tmp_path, "NonZero", [flags], np.argwhere(flags))


def test_one_hot_leaves_unknown_classes_empty(tmp_path: Path) -> None:
    classes = np.array([[0, 2], [-1, 5]], np.int32)
    expected = np.where(classes[..., None] == np.arange(3), np.float32(2), np.float32(-1))
    on, off = np.array(2, np.float32), np.array(-1, np.float32)
    check_primitive(tmp_path, "OneHot", [classes, Const(3), on, off, Arg("axis", -1)], expected)
    check_primitive(tmp_path, "OneHot", [classes, Const(3), on, off, Arg("axis", 1)], np.moveaxis(expected, -1, 1))


def test_padding(tmp_path: Path) -> None:
    pairs = ((0, 0), (1, 2), (0, 1))
    check_primitive(tmp_path, "Pad", [X], np.pad(X, pairs), paddings=pairs)
    flat = np.array([0, 1, 1, 2], np.int64)  # from the last axis on
    for mode in ("constant", "reflect", "edge"):
        fill = [Const(np.array(0, np.float32))] if mode == "constant" else []
        expected = np.pad(X, pairs, mode)  # type: ignore[call-overload]
        items = [X, Const(flat), *fill]
        check_primitive(tmp_path, "PadV3", items, expected, mode=mode, paddings_contiguous=True)
    apart = np.array([0, 1, 1, 2], np.int64)
    expected = np.pad(X, ((0, 0), (1, 2), (0, 1)))
    check_primitive(
        tmp_path, "PadV3", [X, Const(apart[[0, 2, 1, 3]])], expected, mode="constant", paddings_contiguous=False
    )
    check_primitive(
        tmp_path,
        "ConstantPadND",
        [X, Const((2, 0)), Const(7.0)],
        np.pad(X, ((0, 0), (0, 0), (2, 0)), constant_values=7),
    )
    check_primitive(tmp_path, "ReflectionPad1D", [X, Const((1, 2))], np.pad(X, ((0, 0), (0, 0), (1, 2)), "reflect"))
    mirrored = np.pad(X, pairs, "reflect")
    check_primitive(tmp_path, "MirrorPad", [X, Const(np.array(pairs))], mirrored, mode="REFLECT")


def test_pixels_and_depth(tmp_path: Path) -> None:
    x = np.arange(64, dtype=np.float32).reshape(1, 8, 2, 4)
    shuffled = x.reshape(1, 2, 2, 2, 2, 4).transpose(0, 1, 4, 2, 5, 3).reshape(1, 2, 4, 8)
    check_primitive(tmp_path, "PixelShuffle", [x, Const(2)], shuffled)
    depth = x.reshape(1, 2, 2, 2, 2, 4).transpose(0, 3, 4, 1, 5, 2).reshape(1, 2, 4, 8)
    check_primitive(tmp_path, "DepthToSpace", [x, Arg("block_size", 2)], depth)
    check_primitive(tmp_path, "SpaceToDepth", [depth, Arg("block_size", 2)], x)


def test_creation(tmp_path: Path) -> None:
    check_primitive(tmp_path, "ZerosLike", [X], np.zeros_like(X))
    check_primitive(tmp_path, "OnesLike", [INDEX], np.ones_like(INDEX))
    check_primitive(tmp_path, "FullLike", [X, Const(2.5), Const(None)], np.full_like(X, 2.5))
    check_primitive(tmp_path, "Zeros", [Const((2, 3))], np.zeros((2, 3), np.float32))
    check_primitive(tmp_path, "Ones", [Const((2, 3))], np.ones((2, 3), np.int64))
    check_primitive(tmp_path, "FillV2", [Const((2, 3)), Const(np.array(4, np.float32))], np.full((2, 3), 4, np.float32))
    check_primitive(tmp_path, "Fill", [Const(43), Const((2, 3)), Const(4.0)], np.full((2, 3), 4, np.float32))
    check_primitive(tmp_path, "Range", [Const(1), Const(9), Const(3), Const(1000)], np.arange(1, 9, 3))
    check_primitive(tmp_path, "Arange", [Const(0.0), Const(1.0), Const(0.25)], np.arange(0, 1, 0.25, np.float32))
    check_primitive(tmp_path, "LinSpace", [Const(0.0), Const(1.0), Const(5)], np.linspace(0, 1, 5, dtype=np.float32))
    check_primitive(tmp_path, "Eye", [Const(2), Const(3), Const(43)], np.eye(2, 3, dtype=np.float32))


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "int32"), ("int32", "float16"), ("float32", "bool"), ("bool", "float32")]
)
def test_casts(tmp_path: Path, source: str, target: str) -> None:
    x = (X - 3.7).astype(source)
    check_primitive(tmp_path, "Cast", [x, Const(43)], x.astype(target), rtol=1e-3)


def test_aliases(tmp_path: Path) -> None:
    for name in ("Identity", "StopGradient", "Load", "Depend", "Contiguous", "TensorMove"):
        check_primitive(tmp_path, name, [X], X)
    check_primitive(tmp_path, "Dropout", [X], X, unused=1, keep_prob=0.5)


def dynamic_shape_graph(style: str = "inputs") -> Builder:
    """x of open sizes -> x reshaped to (second size * 2, first size, -1), computed by the graph."""
    builder = Builder("inputs")
    x = builder.input("float32", (-1, -1, 4))
    sizes = builder.call("Shape", x)
    first = builder.call("TupleGetItem", sizes, builder.constant(0))
    second = builder.call("TupleGetItem", sizes, builder.constant(1))
    doubled = builder.call("ScalarMul", second, builder.constant(2))
    wanted = builder.call("MakeTuple", doubled, first, builder.constant(-1))
    builder.output(builder.call("Reshape", x, wanted, result=("float32", (-1, -1, -1))))
    return builder


def test_sizes_computed_by_the_graph(tmp_path: Path) -> None:
    data = convert_built(dynamic_shape_graph(), tmp_path).to_bytes()
    for shape in ((2, 3, 4), (5, 1, 4)):
        x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        (result,) = run_model(data, [x])
        np.testing.assert_array_equal(result, x.reshape(2 * shape[1], shape[0], -1))


def test_scalars_travel_between_tensors_and_tuples(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (-1, 4))
    rows = builder.call("TupleGetItem", builder.call("Shape", x), builder.constant(0))
    tensor = builder.call("ScalarToTensor", rows, builder.constant(35), result=("int64", ()))
    scalar = builder.call("TensorToScalar", tensor, result=("int64", (0,)))
    numbers = builder.call("Range", builder.constant(0), scalar, builder.constant(1), result=("int64", (-1,)))
    builder.output(numbers)
    (result,) = run_model(convert_built(builder, tmp_path).to_bytes(), [np.zeros((3, 4), np.float32)])
    np.testing.assert_array_equal(result, np.arange(3))


def test_slices_with_computed_bounds(tmp_path: Path) -> None:
    builder = Builder()
    x, y = builder.input("float32", (-1, 4)), builder.input("float32", (-1, 4))
    rows = builder.call("TupleGetItem", builder.call("Shape", y), builder.constant(0))
    begin = builder.call("MakeTuple", builder.constant(0))
    end = builder.call("MakeTuple", rows)
    masks = [builder.constant(0) for _ in range(5)]
    step = builder.constant((1,))
    builder.output(builder.call("StridedSlice", x, begin, end, step, *masks, result=("float32", (-1, 4))))
    big = np.arange(20, dtype=np.float32).reshape(5, 4)
    (result,) = run_model(convert_built(builder, tmp_path).to_bytes(), [big, big[:2]])
    np.testing.assert_array_equal(result, big[:2])


def test_arguments_that_the_graph_computes_are_refused(tmp_path: Path) -> None:
    builder = Builder()
    x, order = builder.input("float32", (2, 3)), builder.input("int64", (2,))
    builder.output(builder.call("Transpose", x, order, result=("float32", (-1, -1))))
    with pytest.raises(ConversionRefused, match=r"Transpose: argument 'perm' is computed"):
        convert_built(builder, tmp_path)


def test_axes_outside_of_the_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match="axis 7"):
        run_primitive(tmp_path, "TransposeExt", [X, Const(0), Const(7)], [X])
