"""Mappings of matrix products, normalisations, convolutions, pools and resizes, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.unit.mindir_reference as ref
from inflight.mindir import ConversionRefused
from tests.unit.mindir_builder import Arg, Const, check_primitive, run_primitive

RNG = np.random.default_rng(11)
MODERN: dict[str, Any] = {"styles": ("inputs",)}
OLD: dict[str, Any] = {"styles": ("attributes",)}


def f32(*shape: int) -> np.ndarray:
    return RNG.uniform(-2, 2, shape).astype(np.float32)


def real(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


A, B = f32(3, 4), f32(4, 5)
IMAGE = f32(2, 4, 7, 6)
PER_CHANNEL = [f32(4) for _ in range(4)]


def spread(vector: np.ndarray) -> np.ndarray:
    return vector[:, None, None]


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_matmul(tmp_path: Path, transposed: tuple[bool, bool]) -> None:
    flags = [Arg("transpose_a", transposed[0]), Arg("transpose_b", transposed[1])]
    left = A.T.copy() if transposed[0] else A
    right = B.T.copy() if transposed[1] else B
    check_primitive(tmp_path, "MatMul", [left, right, *flags], A @ B)
    batch = np.stack([left, 2 * left]), np.stack([right, right + 1])
    expected = np.stack([A @ B, (2 * A) @ (B + 1)])
    check_primitive(tmp_path, "BatchMatMul", [*batch, *flags], expected)


def test_products_of_mint(tmp_path: Path) -> None:
    check_primitive(tmp_path, "MatMulExt", [A, B], A @ B)
    check_primitive(tmp_path, "Mv", [A, B[:, 0].copy()], A @ B[:, 0])
    weight, bias = f32(5, 4), f32(5)
    check_primitive(tmp_path, "Dense", [A, weight, bias], A @ weight.T + bias)
    check_primitive(tmp_path, "Dense", [A, weight, Const(None)], A @ weight.T)
    base = f32(3, 5)
    check_primitive(tmp_path, "Addmm", [base, A, B, Const(0.5), Const(2)], real(0.5 * base + 2 * (A @ B)))


def test_bias_goes_to_the_channels(tmp_path: Path) -> None:
    check_primitive(tmp_path, "BiasAdd", [A, PER_CHANNEL[0]], A + PER_CHANNEL[0])
    check_primitive(
        tmp_path, "BiasAdd", [IMAGE, PER_CHANNEL[0], Arg("data_format", "NCHW")], IMAGE + spread(PER_CHANNEL[0])
    )
    with pytest.raises(ConversionRefused, match="NHWC"):
        run_primitive(tmp_path, "BiasAdd", [IMAGE, f32(6), Arg("data_format", "NHWC")], [IMAGE])


def test_batch_norm(tmp_path: Path) -> None:
    scale, bias, mean, variance = PER_CHANNEL
    variance = np.abs(variance) + 0.5
    expected = spread(scale) * (IMAGE - spread(mean)) / np.sqrt(spread(variance) + 0.01) + spread(bias)
    arguments = [Arg("is_training", False), Arg("epsilon", 0.01), Arg("momentum", 0.1), Arg("format", "NCHW")]
    inputs = [IMAGE, scale, bias, mean, variance]
    check_primitive(tmp_path, "BatchNorm", [*inputs, *arguments], expected, unused=4)
    arguments = [Const(False), Const(0.1), Const(0.01)]
    check_primitive(tmp_path, "BatchNormExt", [*inputs, *arguments], expected, unused=2, **MODERN)
    plain = (IMAGE - spread(mean)) / np.sqrt(spread(variance) + 0.01)
    arguments = [IMAGE, Const(None), Const(None), mean, variance, *arguments]
    check_primitive(tmp_path, "BatchNormExt", arguments, plain, unused=2, **MODERN)


def test_batch_norm_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match=r"set_train\(False\)"):
        run_primitive(tmp_path, "BatchNorm", [IMAGE, *PER_CHANNEL, Arg("is_training", True)], [IMAGE], unused=4)


def test_layer_norm(tmp_path: Path) -> None:
    x, scale, bias = f32(2, 3, 5), f32(5), f32(5)
    expected = ref.normalised(x, (2,), 1e-3) * scale + bias
    arguments = [Arg("begin_norm_axis", -1), Arg("begin_params_axis", -1), Arg("epsilon", 1e-3)]
    check_primitive(tmp_path, "LayerNorm", [x, scale, bias, *arguments], expected, unused=2)
    over_both = ref.normalised(x, (1, 2), 1e-3) * scale + bias
    arguments = [Arg("begin_norm_axis", 1), Arg("begin_params_axis", 2), Arg("epsilon", 1e-3)]
    check_primitive(tmp_path, "LayerNorm", [x, scale, bias, *arguments], over_both, unused=2)
    shape = (3, 5)
    scale, bias = f32(*shape), f32(*shape)
    expected = ref.normalised(x, (1, 2), 1e-5) * scale + bias
    check_primitive(tmp_path, "LayerNormExt", [x, Const(shape), scale, bias, Const(1e-5)], expected, unused=2, **MODERN)
    plain = ref.normalised(x, (1, 2), 1e-5)
    arguments = [x, Const(shape), Const(None), Const(None), Const(1e-5)]
    check_primitive(tmp_path, "LayerNormExt", arguments, plain, unused=2, **MODERN)


def test_other_norms(tmp_path: Path) -> None:
    x, scale = f32(2, 3, 5), f32(5)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    check_primitive(tmp_path, "RmsNorm", [x, scale, Arg("epsilon", 1e-3)], rms, unused=1)
    groups = ref.normalised(IMAGE.reshape(2, 2, -1), (2,), 1e-3).reshape(IMAGE.shape)
    expected = groups * spread(PER_CHANNEL[0]) + spread(PER_CHANNEL[1])
    arguments = [IMAGE, Const(2), PER_CHANNEL[0], PER_CHANNEL[1], Const(1e-3)]
    check_primitive(tmp_path, "GroupNorm", arguments, expected, unused=2, **MODERN)
    per_instance = ref.normalised(IMAGE, (2, 3), 1e-3) * spread(PER_CHANNEL[0]) + spread(PER_CHANNEL[1])
    check_primitive(tmp_path, "InstanceNorm", [IMAGE, *PER_CHANNEL], per_instance, unused=2, epsilon=1e-3)
    length = np.sqrt(np.maximum((x**2).sum(1, keepdims=True), 1e-4))
    check_primitive(tmp_path, "L2Normalize", [x, Arg("axis", (1,)), Arg("epsilon", 1e-4)], x / length)


def conv_attributes(
    stride: tuple[int, int], mode: str, pads: tuple[int, ...] = (0, 0, 0, 0), dilation: int = 1, group: int = 1
) -> dict[str, Any]:
    """As exported: strides and dilations with two leading ones; both spellings of the group."""
    return {
        "stride": (1, 1, *stride),
        "pad_mode": mode,
        "pad": pads,
        "pad_list": pads,
        "dilation": (1, 1, dilation, dilation),
        "group": group,
        "groups": group,
        "format": "NCHW",
    }


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("mode", ["valid", "same", "pad"])
def test_conv2d(tmp_path: Path, mode: str, dilation: int, stride: tuple[int, int]) -> None:
    weight = f32(6, 4, 3, 2)
    window = (2 * dilation + 1, dilation + 1)
    pads = {
        "valid": ((0, 0), (0, 0)),
        "pad": ((1, 2), (0, 1)),
        "same": tuple(ref.same_pads(IMAGE.shape[2 + axis], window[axis], stride[axis]) for axis in (0, 1)),
    }[mode]
    expected = real(ref.conv2d(IMAGE, weight, stride, pads, (dilation, dilation)))
    given = tuple(size for pair in pads for size in pair) if mode == "pad" else (0, 0, 0, 0)
    attributes = conv_attributes(stride, mode, given, dilation)
    # The kernel has to be known, so sizes are either all known here, or those of the image are open (below).
    check_primitive(tmp_path, "Conv2D", [IMAGE, weight], expected, open_sizes=False, **attributes)


def test_grouped_and_depthwise_convolution(tmp_path: Path) -> None:
    weight = f32(8, 2, 3, 3)
    expected = real(ref.conv2d(IMAGE, weight, groups=2))
    check_primitive(
        tmp_path, "Conv2D", [IMAGE, weight], expected, open_sizes=False, **conv_attributes((1, 1), "valid", group=2)
    )
    # (multiplier, channels, h, w): output channel c * multiplier + m.
    filters = f32(2, 4, 3, 3)
    each = filters.transpose(1, 0, 2, 3).reshape(8, 1, 3, 3)
    expected = real(ref.conv2d(IMAGE, each, groups=4))
    check_primitive(
        tmp_path,
        "DepthwiseConv2dNative",
        [IMAGE, filters],
        expected,
        open_sizes=False,
        **conv_attributes((1, 1), "valid"),
    )


@pytest.mark.parametrize("mode", ["valid", "same", "pad"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_convolution(tmp_path: Path, mode: str, stride: int) -> None:
    """As nn.Conv2dTranspose exports it: the wanted sizes are an input."""
    x, weight = f32(2, 3, 4, 5), f32(3, 2, 3, 3)
    pads = (1, 1, 1, 1) if mode == "pad" else (0, 0, 0, 0)
    if mode == "same":
        sizes = (4 * stride, 5 * stride)
        each = tuple(ref.same_pads(size, 3, stride) for size in sizes)
    else:
        amount = 2 * pads[0]
        sizes = ((4 - 1) * stride + 3 - amount, (5 - 1) * stride + 3 - amount)
        each = ((pads[0], pads[1]), (pads[2], pads[3]))
    expected = real(ref.conv2d_transposed(x, weight, (stride, stride), each, sizes))
    attributes = conv_attributes((stride, stride), mode, pads)
    for name in ("Conv2DTranspose", "Conv2DBackpropInput"):
        check_primitive(tmp_path, name, [x, weight, Const((2, 2, *sizes))], expected, open_sizes=False, **attributes)


@pytest.mark.parametrize("padding", [0, (1, 2)])
def test_convolution_of_mint(tmp_path: Path, padding: int | tuple[int, int]) -> None:
    weight, bias = f32(6, 2, 3, 2), f32(6)
    each = (padding, padding) if isinstance(padding, int) else padding
    pads = ((each[0], each[0]), (each[1], each[1]))
    expected = real(ref.conv2d(IMAGE, weight, (2, 1), pads, groups=2) + spread(bias))
    common = [IMAGE, weight, bias, Const((2, 1)), Const(padding), Const(1)]
    check_primitive(tmp_path, "Conv2DExt", [*common, Const(2)], expected, open_sizes=False, **MODERN)
    arguments = [*common, Const(False), Const(0), Const(2)]
    check_primitive(tmp_path, "Convolution", arguments, expected, open_sizes=False, **MODERN)
    same = tuple(ref.same_pads(IMAGE.shape[2 + axis], weight.shape[2 + axis], 1) for axis in (0, 1))
    expected = real(ref.conv2d(IMAGE, weight, (1, 1), same, groups=2))
    arguments = [IMAGE, weight, Const(None), Const(1), Const("same"), Const(1), Const(2)]
    check_primitive(tmp_path, "Conv2DPadding", arguments, expected, open_sizes=False, **MODERN)


def test_transposed_convolution_of_mint(tmp_path: Path) -> None:
    x, weight, bias = f32(2, 3, 4, 5), f32(3, 2, 3, 3), f32(2)
    # stride 2, padding 1, output_padding 1: 2 * size.
    expected = real(ref.conv2d_transposed(x, weight, (2, 2), ((1, 0), (1, 0)), (8, 10)) + spread(bias))
    arguments = [x, weight, bias, Const(2), Const(1), Const(1), Const(1), Const(1)]
    check_primitive(tmp_path, "ConvTranspose2D", arguments, expected, open_sizes=False, **MODERN)
    arguments = [x, weight, bias, Const(2), Const(1), Const(1), Const(True), Const(1), Const(1)]
    check_primitive(tmp_path, "Convolution", arguments, expected, open_sizes=False, **MODERN)


@pytest.mark.parametrize("mode", ["VALID", "SAME"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_pools(tmp_path: Path, mode: str, kernel: int, stride: int) -> None:
    pads = ((0, 0), (0, 0))
    if mode == "SAME":
        above, beside = (ref.same_pads(size, kernel, stride) for size in IMAGE.shape[2:])
        pads = above, beside
    best = real(ref.pool2d(IMAGE, kernel, stride, pads, np.nanmax))
    # What `same` adds is not counted in the mean.
    mean = real(ref.pool2d(IMAGE, kernel, stride, pads, np.nanmean))
    opened = mode == "VALID" or stride == 1
    old = {"kernel_size": (1, 1, kernel, kernel), "strides": (1, 1, stride, stride), "pad_mode": mode, "format": "NCHW"}
    check_primitive(tmp_path, "MaxPool", [IMAGE], best, open_sizes=opened, **OLD, **old)
    check_primitive(tmp_path, "AvgPool", [IMAGE], mean, open_sizes=opened, **OLD, **old)
    number = {"SAME": 1, "VALID": 2}[mode]
    sizes = [Const((kernel, kernel)), Const((stride, stride))]
    check_primitive(tmp_path, "AvgPool", [IMAGE, *sizes, Const(number), Const(0)], mean, open_sizes=opened, **MODERN)


def test_same_with_open_sizes_is_refused(tmp_path: Path) -> None:
    attributes: dict[str, Any] = {"kernel_size": (1, 1, 3, 3), "strides": (1, 1, 2, 2), "pad_mode": "SAME"}
    with pytest.raises(ConversionRefused, match="height and width"):
        run_primitive(tmp_path, "MaxPool", [IMAGE], [IMAGE], "attributes", True, **attributes)


def test_pools_of_mint(tmp_path: Path) -> None:
    pads = ((1, 1), (1, 1))
    counted = real(ref.pool2d(np.pad(IMAGE, [(0, 0), (0, 0), (1, 1), (1, 1)]), 3, 2, ((0, 0), (0, 0)), np.mean))
    without = real(ref.pool2d(IMAGE, 3, 2, pads, np.nanmean))
    for count, expected in ((True, counted), (False, without)):
        arguments = [Const((3, 3)), Const((2, 2)), Const((1, 1)), Const(False), Const(count), Const(None)]
        check_primitive(tmp_path, "AvgPool2D", [IMAGE, *arguments], expected, **MODERN)
    best = real(ref.pool2d(IMAGE, 3, 2, pads, np.nanmax))
    arguments = [Const((3, 3)), Const((2, 2)), Const((1, 1)), Const((1, 1)), Const(False)]
    check_primitive(tmp_path, "MaxPoolWithMask", [IMAGE, *arguments], best, unused=1, **MODERN)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (3, 4), (2, 6)])
def test_adaptive_average_pool(tmp_path: Path, sizes: tuple[int, int]) -> None:
    expected = real(ref.adaptive_avg_pool2d(IMAGE, sizes))
    check_primitive(
        tmp_path, "AdaptiveAvgPool2D", [IMAGE, Arg("output_size", sizes)], expected, open_sizes=sizes == (1, 1)
    )


def test_adaptive_max_pool(tmp_path: Path) -> None:
    expected = IMAGE[:, :, :6].reshape(2, 4, 3, 2, 2, 3).max((3, 5))
    x = np.ascontiguousarray(IMAGE[:, :, :6])
    check_primitive(
        tmp_path, "AdaptiveMaxPool2D", [x, Arg("output_size", (3, 2))], expected, unused=1, open_sizes=False
    )


@pytest.mark.parametrize("sizes", [(14, 12), (5, 4), (10, 13), (7, 6)])
@pytest.mark.parametrize(("corners", "half"), [(False, False), (True, False), (False, True)])
def test_resizes(tmp_path: Path, sizes: tuple[int, int], corners: bool, half: bool) -> None:
    flags = [Arg("align_corners", corners), Arg("half_pixel_centers", half)]
    smooth = real(ref.resize(IMAGE, sizes, False, corners, half))
    check_primitive(tmp_path, "ResizeBilinearV2", [IMAGE, Const(sizes), *flags], smooth)
    nearest = real(ref.resize(IMAGE, sizes, True, corners, half))
    check_primitive(tmp_path, "ResizeNearestNeighborV2", [IMAGE, Const(sizes), *flags], nearest)
    if not half:
        check_primitive(tmp_path, "ResizeNearestNeighbor", [IMAGE, Arg("size", sizes), flags[0]], nearest, **OLD)
    check_primitive(tmp_path, "ResizeBilinear", [IMAGE, Arg("size", sizes), *flags], smooth, **OLD)


def test_upsampling_of_mint(tmp_path: Path) -> None:
    nearest = real(ref.resize(IMAGE, (14, 12), True))
    check_primitive(tmp_path, "UpsampleNearest2D", [IMAGE, Const((14, 12)), Const(None)], nearest, **MODERN)
    by_scale = [IMAGE, Const(None), Const((2.0, 2.0))]
    check_primitive(tmp_path, "UpsampleNearest2D", by_scale, nearest, open_sizes=False, **MODERN)
    smooth = real(ref.resize(IMAGE, (14, 12), False, False, True))
    arguments = [IMAGE, Const((14, 12)), Const(None), Const(False)]
    check_primitive(tmp_path, "UpsampleBilinear2D", arguments, smooth, **MODERN)
