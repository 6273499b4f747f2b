"""Pooling and resizing of images."""

from __future__ import annotations

import numpy as np

from inflight.mindir.emitter import Tensor
from inflight.mindir.model import Opaque
from inflight.mindir.op import Op, Value, maps
from inflight.mindir.ops_conv import Window, attribute, explicit_pads, same_pads, spatial


def _pool(
    op: Op, kind: str, window: Window, pads: list[int], *, ceil: bool = False, count_pads: bool = False
) -> Tensor:
    return op.graph.node(
        kind,
        op.tensor(0),
        same=False,
        kernel_shape=window.size,
        strides=window.stride,
        pads=pads,
        ceil_mode=int(ceil),
        count_include_pad=int(count_pads) if kind == "AveragePool" else None,
    )


@maps("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D")
def _classic_pool(op: Op) -> Value:
    """Kernel and strides with one entry for each axis, or with two leading ones for batch and channels."""
    value = op.tensor(0)
    axes = value.rank - 2
    kernel = spatial(op.integers(1, "kernel_size"), axes)
    strides = spatial(op.integers(2, "strides"), axes)
    window = Window(tuple(kernel), tuple(strides), (1,) * axes)
    mode = op.pad_mode(3)
    op.require_channels_first(4, "data_format" if "data_format" in op.attributes else "format")
    kind = "MaxPool" if op.primitive.startswith("Max") else "AveragePool"
    if mode == "PAD":
        before, after = explicit_pads(op, attribute(op, 0, "pad_list", "pad"), axes)
    else:
        before, after = same_pads(op, value, window) if mode == "SAME" else ([0] * axes, [0] * axes)
    if op.static(len(op.inputs), "divisor_override", None):
        op.refuse("divisor_override is not supported")
    # Only the three-dimensional pools have these two; what `same` adds is never counted.
    ceil = bool(op.static(len(op.inputs), "ceil_mode", False))
    count = mode == "PAD" and op.flag(len(op.inputs), "count_include_pad", True)
    return _pool(op, kind, window, before + after, ceil=ceil, count_pads=count)


@maps("AvgPool2D", "AvgPool1D", "AvgPool3DExt")
def _avg_pool_mint(op: Op) -> Value:
    axes = {"AvgPool1D": 1, "AvgPool2D": 2, "AvgPool3DExt": 3}[op.primitive]
    kernel = op.integers(1, "kernel_size")
    strides = kernel if op.static(2, "stride", None) in (None, ()) else op.integers(2, "stride")
    window = Window(tuple(spatial(kernel, axes)), tuple(spatial(strides, axes)), (1,) * axes)
    before, after = explicit_pads(op, op.integers(3, "padding", 0), axes)
    if op.static(6, "divisor_override", None):
        op.refuse("divisor_override is not supported")
    if op.tensor(0).rank != axes + 2:
        op.refuse("an input without a batch dimension is not supported")
    ceil, count = op.flag(4, "ceil_mode"), op.flag(5, "count_include_pad", True)
    return _pool(op, "AveragePool", window, before + after, ceil=ceil, count_pads=count)


@maps("MaxPoolWithIndices", "MaxPoolWithMask")
def _max_pool_mint(op: Op) -> Value:
    axes = 2
    kernel = spatial(op.integers(1, "kernel_size"), axes)
    strides = kernel if op.static(2, "strides", None) in (None, ()) else spatial(op.integers(2, "strides"), axes)
    before, after = explicit_pads(op, op.integers(3, "pads", 0), axes)
    values = op.graph.node(
        "MaxPool",
        op.tensor(0),
        same=False,
        kernel_shape=kernel,
        strides=strides,
        pads=before + after,
        dilations=spatial(op.integers(4, "dilation", 1), axes),
        ceil_mode=int(op.flag(5, "ceil_mode")),
    )
    return values, Opaque("the positions found by max pooling")


def _averaging(length: int, wanted: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The (wanted, length) matrix of adaptive average pooling."""
    matrix = np.zeros((wanted, length), np.float32)
    for row in range(wanted):
        first, last = row * length // wanted, -(-(row + 1) * length // wanted)
        matrix[row, first:last] = 1 / (last - first)
    return matrix


@maps("AdaptiveAvgPool1D", "AdaptiveAvgPool2D", "AdaptiveAvgPool2DExt")
def _adaptive_avg_pool(op: Op) -> Value:
    value = op.tensor(0)
    axes = 1 if op.primitive.endswith("1D") else 2
    wanted = _adaptive_sizes(op, value, axes)
    if all(size == 1 for size in wanted):
        last = op.graph.constant(list(range(-axes, 0)), "int64")
        return op.graph.node("ReduceMean", value, last, same=False, keepdims=1)
    lengths = [op.count(length, "size of its input") for length in _lengths(op, value, axes)]
    # A product with a constant matrix on either side averages windows of uneven sizes too.
    columns = op.to_tensor(_averaging(lengths[-1], wanted[-1]).T.copy(), value.dtype)
    result = op.graph.node("MatMul", value, columns, same=False)
    if axes == 2:
        result = op.graph.node(
            "MatMul", op.to_tensor(_averaging(lengths[0], wanted[0]), value.dtype), result, same=False
        )
    return result


@maps("AdaptiveMaxPool1D", "AdaptiveMaxPool2D")
def _adaptive_max_pool(op: Op) -> Value:
    value = op.tensor(0)
    axes = 1 if op.primitive.endswith("1D") else 2
    wanted = _adaptive_sizes(op, value, axes)
    if all(size == 1 for size in wanted):
        last = op.graph.constant(list(range(-axes, 0)), "int64")
        result = op.graph.node("ReduceMax", value, last, same=False, keepdims=1)
    else:
        lengths = _lengths(op, value, axes)
        if any(length % size for length, size in zip(lengths, wanted, strict=True)):
            op.refuse(f"sizes {tuple(lengths)} are no multiples of the output's {tuple(wanted)}")
        step = tuple(length // size for length, size in zip(lengths, wanted, strict=True))
        result = _pool(op, "MaxPool", Window(step, step, (1,) * axes), [0] * (2 * axes))
    return result, Opaque("the positions found by max pooling")


def _adaptive_sizes(op: Op, value: Tensor, axes: int) -> list[int]:
    given = op.static(1, "output_size")
    sizes = list(given) if isinstance(given, tuple) else [given]
    sizes = sizes * axes if len(sizes) == 1 else sizes
    for axis, size in enumerate(sizes):
        if size is None or size == -1:
            sizes[axis] = _lengths(op, value, axes)[axis]
    return [op.count(int(size), "output_size") for size in sizes]


def _lengths(op: Op, value: Tensor, axes: int) -> list[int]:
    if value.shape is None or -1 in value.shape[-axes:]:
        op.refuse("height and width of its input have to be known: export the model with them")
    return list(value.shape[-axes:])


def _resize(op: Op, sizes: Value, mode: str, coordinates: str, nearest: str | None = None) -> Tensor:
    value = op.tensor(0)
    axes = list(range(2, value.rank))
    wanted = op.to_tensor(sizes, "int64")
    return op.graph.node(
        "Resize",
        value,
        None,
        None,
        wanted,
        same=False,
        axes=axes,
        mode=mode,
        coordinate_transformation_mode=coordinates,
        nearest_mode=nearest,
    )


@maps("ResizeBilinear", "ResizeBilinearV2")
def _resize_bilinear(op: Op) -> Value:
    coordinates = "asymmetric"
    if op.flag(2, "align_corners"):
        coordinates = "align_corners"
    elif op.flag(3, "half_pixel_centers"):
        coordinates = "half_pixel"
    return _resize(op, op.value(1, "size"), "linear", coordinates)


@maps("ResizeNearestNeighbor", "ResizeNearestNeighborV2")
def _resize_nearest(op: Op) -> Value:
    size = op.value(1, "size")
    if op.flag(2, "align_corners"):
        return _resize(op, size, "nearest", "align_corners", "round_prefer_ceil")
    if op.flag(3, "half_pixel_centers"):
        return _resize(op, size, "nearest", "half_pixel", "round_prefer_ceil")
    return _resize(op, size, "nearest", "asymmetric", "floor")


@maps("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D")
def _upsample_nearest(op: Op) -> Value:
    return _resize(op, _upsampled_sizes(op), "nearest", "asymmetric", "floor")


@maps("UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleTrilinear3D")
def _upsample_linear(op: Op) -> Value:
    return _resize(op, _upsampled_sizes(op), "linear", "align_corners" if op.flag(3, "align_corners") else "half_pixel")


def _upsampled_sizes(op: Op) -> Value:
    sizes = op.value(1, "output_size", None)
    if sizes is not None:
        return sizes
    value = op.tensor(0)
    scales = op.static(2, "scales")
    lengths = _lengths(op, value, value.rank - 2)
    sizes = tuple(int(length * scale) for length, scale in zip(lengths, scales, strict=True))
    # A factor that does not lead to whole sizes would move the sampling points.
    if any(size != length * scale for size, length, scale in zip(sizes, lengths, scales, strict=True)):
        op.refuse(f"scales {scales} of {tuple(lengths)} do not give whole sizes: export the model with sizes")
    return sizes
