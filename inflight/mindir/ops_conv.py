"""Convolutions and transposed convolutions."""

from __future__ import annotations

from typing import NamedTuple

from inflight.mindir.emitter import Tensor
from inflight.mindir.op import Op, Value, maps


class Window(NamedTuple):
    """Per spatial axis: size (dilation counted in), step and dilation."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


def spatial(values: tuple[int, ...], axes: int) -> list[int]:
    """The last `axes` of the values; one value serves all axes."""
    if len(values) == 1:
        return [values[0]] * axes
    return list(values[-axes:])


def kernel_sizes(op: Op, weight: Tensor) -> list[int]:
    if weight.shape is None or -1 in weight.shape[2:]:
        op.refuse("the size of its weight is not known")
    return list(weight.shape[2:])


def same_pads(op: Op, value: Tensor, window: Window) -> tuple[list[int], list[int]]:
    """Pads before and after each axis, so that the output has ceil(size / stride) positions; odd ones go after."""
    before: list[int] = []
    after: list[int] = []
    sizes = value.shape[2:] if value.shape is not None else (-1,) * len(window.size)
    for length, size, stride in zip(sizes, window.size, window.stride, strict=True):
        if stride == 1:
            total = size - 1
        elif length == -1:
            op.refuse("pad mode 'same' with a stride needs a known height and width: export the model with them")
        else:
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return before, after


def explicit_pads(op: Op, pads: tuple[int, ...], axes: int) -> tuple[list[int], list[int]]:
    """Of one number, one for each axis, or (before, after) for each axis."""
    if len(pads) == 2 * axes:
        return list(pads[::2]), list(pads[1::2])
    if len(pads) in (1, axes):
        both = spatial(pads, axes)
        return both, both
    return op.refuse(f"pads {pads} do not fit {axes} axes")


def attribute(op: Op, default: int, *names: str) -> tuple[int, ...]:
    """The first of the attributes that is there; older and newer primitives spell some of them differently."""
    for name in names:
        if name in op.attributes:
            return op.integers(len(op.inputs), name)
    return (default,)


def _classic_pads(op: Op, value: Tensor, window: Window) -> tuple[list[int], list[int]]:
    mode = op.pad_mode(len(op.inputs))
    axes = len(window.size)
    if mode == "VALID":
        return [0] * axes, [0] * axes
    if mode == "SAME":
        return same_pads(op, value, window)
    return explicit_pads(op, attribute(op, 0, "pad", "pad_list"), axes)


def _classic_window(op: Op, weight: Tensor) -> Window:
    kernel = kernel_sizes(op, weight)
    stride = spatial(attribute(op, 1, "stride", "strides"), len(kernel))
    dilation = spatial(attribute(op, 1, "dilation", "dilations"), len(kernel))
    size = tuple((length - 1) * step + 1 for length, step in zip(kernel, dilation, strict=True))
    return Window(size, tuple(stride), tuple(dilation))


@maps("Conv2D", "Conv3D")
def _conv(op: Op) -> Value:
    value, weight = op.tensor(0), op.tensor(1)
    op.require_channels_first(len(op.inputs))
    window = _classic_window(op, weight)
    before, after = _classic_pads(op, value, window)
    groups = attribute(op, 1, "group", "groups")[0]
    return _emit_conv(op, value, weight, None, window, before + after, groups)


@maps("DepthwiseConv2dNative")
def _depthwise(op: Op) -> Value:
    value, weight = op.tensor(0), op.tensor(1)
    kernel = kernel_sizes(op, weight)
    window = _classic_window(op, weight)
    before, after = _classic_pads(op, value, window)
    assert weight.shape is not None
    # (multiplier, channels, h, w) becomes (channels · multiplier, 1, h, w).
    swapped = op.graph.node("Transpose", weight, same=False, perm=[1, 0, 2, 3])
    filters = op.graph.node("Reshape", swapped, op.graph.constant([-1, 1, *kernel], "int64"), same=False)
    return _emit_conv(op, value, filters, None, window, before + after, weight.shape[1])


def _emit_conv(
    op: Op, value: Tensor, weight: Tensor, bias: Tensor | None, window: Window, pads: list[int], groups: int
) -> Tensor:
    return op.graph.node(
        "Conv",
        value,
        weight,
        bias,
        same=False,
        strides=window.stride,
        dilations=window.dilation,
        pads=pads,
        group=groups,
    )


@maps("Conv1DExt", "Conv2DExt", "Conv3DExt", "Conv1DPadding", "Conv2DPadding", "Conv3DPadding")
def _conv_mint(op: Op) -> Value:
    return _mint(op, op.integers(5, "dilation", 1), op.integer(6, "groups", 1))


@maps("Convolution", "ConvolutionStr")
def _convolution(op: Op) -> Value:
    if op.flag(6, "transposed"):
        extra = op.integers(7, "output_padding", 0)
        return _mint_transpose(op, extra, op.integer(8, "groups", 1), op.integers(5, "dilation", 1))
    return _mint(op, op.integers(5, "dilation", 1), op.integer(8, "groups", 1))


def _mint(op: Op, dilations: tuple[int, ...], groups: int) -> Value:
    """A convolution as `mint` calls it: value, weight, bias, stride, padding (numbers, or a text), ..."""
    value, weight, bias = op.tensor(0), op.tensor(1), op.optional(2)
    kernel = kernel_sizes(op, weight)
    axes = len(kernel)
    unbatched = value.rank == axes + 1
    if unbatched:
        value = op.graph.node("Unsqueeze", value, op.graph.constant([0], "int64"), same=False)
    dilation = spatial(dilations, axes)
    size = tuple((length - 1) * step + 1 for length, step in zip(kernel, dilation, strict=True))
    window = Window(size, tuple(spatial(op.integers(3, "stride", 1), axes)), tuple(dilation))
    if op.primitive.endswith(("Str", "Padding")):
        mode = op.pad_mode(4, "padding")
        before, after = same_pads(op, value, window) if mode == "SAME" else ([0] * axes, [0] * axes)
    else:
        before, after = explicit_pads(op, op.integers(4, "padding", 0), axes)
    result = _emit_conv(op, value, weight, bias, window, before + after, groups)
    return op.graph.node("Squeeze", result, op.graph.constant([0], "int64"), same=False) if unbatched else result


@maps("ConvTranspose2D")
def _conv_transpose_mint(op: Op) -> Value:
    extra = op.integers(5, "output_padding", 0)
    return _mint_transpose(op, extra, op.integer(6, "groups", 1), op.integers(7, "dilation", 1))


def _mint_transpose(op: Op, extra: tuple[int, ...], groups: int, dilations: tuple[int, ...]) -> Value:
    value, weight, bias = op.tensor(0), op.tensor(1), op.optional(2)
    axes = len(kernel_sizes(op, weight))
    before, after = explicit_pads(op, op.integers(4, "padding", 0), axes)
    return op.graph.node(
        "ConvTranspose",
        value,
        weight,
        bias,
        same=False,
        strides=spatial(op.integers(3, "stride", 1), axes),
        dilations=spatial(dilations, axes),
        pads=before + after,
        output_padding=spatial(extra, axes),
        group=groups,
    )


@maps("Conv2DTranspose", "Conv2DBackpropInput", "Conv3DTranspose")
def _conv_transpose(op: Op) -> Value:
    """The gradient of a convolution: its pads are those of the convolution that leads back to the input."""
    value, weight = op.tensor(0), op.tensor(1)
    op.require_channels_first(len(op.inputs))
    window = _classic_window(op, weight)
    mode = op.pad_mode(len(op.inputs))
    before: list[int] = []
    after: list[int] = []
    extra: list[int] = []
    given = explicit_pads(op, attribute(op, 0, "pad", "pad_list"), len(window.size)) if mode == "PAD" else None
    for axis, (size, stride) in enumerate(zip(window.size, window.stride, strict=True)):
        length, wanted = _size(value.shape, axis), _size(op.shape, axis)
        if given is not None:
            pads = given[0][axis], given[1][axis]
        else:
            total = 0 if mode == "VALID" else _same_total(size, stride, wanted)
            pads = total // 2, total - total // 2
        rest = (
            _rest(mode, size, stride, sum(pads))
            if -1 in (length, wanted)
            else (wanted - ((length - 1) * stride + size - sum(pads)))
        )
        if not 0 <= rest < max(stride, window.dilation[axis]):
            op.refuse(f"an output of size {wanted} cannot be made of {length} with stride {stride} and window {size}")
        before.append(pads[0])
        after.append(pads[1])
        extra.append(rest)
    return op.graph.node(
        "ConvTranspose",
        value,
        weight,
        same=False,
        strides=window.stride,
        dilations=window.dilation,
        pads=before + after,
        output_padding=extra,
        group=attribute(op, 1, "group", "groups")[0],
    )


def _size(shape: tuple[int, ...] | None, axis: int) -> int:
    return -1 if shape is None else shape[axis + 2]


def _same_total(size: int, stride: int, wanted: int) -> int:
    """Pads of the forward convolution over `wanted` positions; where these are open, a multiple of the stride."""
    if wanted == -1:
        return max(size - stride, 0)
    return max((-(-wanted // stride) - 1) * stride + size - wanted, 0)


def _rest(mode: str, size: int, stride: int, pads: int) -> int:
    """Positions missing at the end of an output whose size is open, as nn.Conv2dTranspose computes it."""
    if mode == "SAME":
        return max(stride - size + pads, 0)
    return max(stride - size, 0) if mode == "VALID" else 0
