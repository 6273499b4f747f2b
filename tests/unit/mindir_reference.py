"""The meaning of MindSpore's primitives, written in plain numpy for the tests of their mappings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

Array = np.ndarray
erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def same_pads(length: int, window: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(length / stride) - 1) * stride + window - length, 0)
    return total // 2, total - total // 2


def conv2d(
    x: Array,
    w: Array,
    stride: tuple[int, int] = (1, 1),
    pads: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Array:
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    out_channels, per_group, *kernel = w.shape
    window = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    sizes = [(x.shape[2 + axis] - window[axis]) // stride[axis] + 1 for axis in (0, 1)]
    result = np.zeros((len(x), out_channels, *sizes))
    for row, column in product(range(sizes[0]), range(sizes[1])):
        top, left = row * stride[0], column * stride[1]
        patch = x[:, :, top : top + window[0] : dilation[0], left : left + window[1] : dilation[1]]
        for channel in range(out_channels):
            first = channel // (out_channels // groups) * per_group
            result[:, channel, row, column] = (patch[:, first : first + per_group] * w[channel]).sum((1, 2, 3))
    return result


def conv2d_transposed(
    x: Array, w: Array, stride: tuple[int, int], pads: Sequence[tuple[int, int]], sizes: tuple[int, int]
) -> Array:
    """The gradient of conv2d with regard to an input of the given height and width; w: (in, out, kh, kw)."""
    (top, bottom), (left, right) = pads
    result = np.zeros((len(x), w.shape[1], sizes[0] + top + bottom, sizes[1] + left + right))
    for row, column in product(range(x.shape[2]), range(x.shape[3])):
        patch = np.einsum("nc,cokl->nokl", x[:, :, row, column], w)
        first, second = row * stride[0], column * stride[1]
        target = result[:, :, first : first + w.shape[2], second : second + w.shape[3]]
        target += patch[:, :, : target.shape[2], : target.shape[3]]
    return result[:, :, top : top + sizes[0], left : left + sizes[1]]


def pool2d(
    x: Array,
    kernel: int,
    stride: int,
    pads: Sequence[tuple[int, int]],
    reduce: Callable[..., Array],
) -> Array:
    """Padded places are NaN, for reductions that leave them out."""
    x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=np.nan)
    sizes = [(x.shape[2 + axis] - kernel) // stride + 1 for axis in (0, 1)]
    result = np.zeros((*x.shape[:2], *sizes))
    for row, column in product(range(sizes[0]), range(sizes[1])):
        patch = x[:, :, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
        result[:, :, row, column] = reduce(patch, axis=(2, 3))
    return result


def adaptive_avg_pool2d(x: Array, sizes: tuple[int, int]) -> Array:
    result = np.zeros((*x.shape[:2], *sizes))
    for row, column in product(range(sizes[0]), range(sizes[1])):
        rows = slice(row * x.shape[2] // sizes[0], math.ceil((row + 1) * x.shape[2] / sizes[0]))
        columns = slice(column * x.shape[3] // sizes[1], math.ceil((column + 1) * x.shape[3] / sizes[1]))
        result[:, :, row, column] = x[:, :, rows, columns].mean((2, 3))
    return result


def _source(index: int, length: int, wanted: int, align_corners: bool, half_pixel: bool) -> float:
    if align_corners:
        return index * (length - 1) / (wanted - 1) if wanted > 1 else 0.0
    if half_pixel:
        return (index + 0.5) * length / wanted - 0.5
    return index * length / wanted


def _resize_axis(x: Array, axis: int, wanted: int, nearest: bool, align_corners: bool, half_pixel: bool) -> Array:
    length = x.shape[axis]
    rows = []
    for index in range(wanted):
        if nearest:
            if half_pixel:
                place = math.floor((index + 0.5) * length / wanted)
            else:
                place = _source(index, length, wanted, align_corners, False)
                place = math.floor(place + 0.5) if align_corners else math.floor(place)
            rows.append(x.take(min(int(place), length - 1), axis))
        else:
            place = max(_source(index, length, wanted, align_corners, half_pixel), 0.0)
            low = min(int(place), length - 1)
            high = min(low + 1, length - 1)
            weight = place - low
            rows.append(x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight)
    return np.stack(rows, axis)


def resize(
    x: Array, sizes: tuple[int, int], nearest: bool, align_corners: bool = False, half_pixel: bool = False
) -> Array:
    x = _resize_axis(x, 2, sizes[0], nearest, align_corners, half_pixel)
    return _resize_axis(x, 3, sizes[1], nearest, align_corners, half_pixel)


def normalised(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
