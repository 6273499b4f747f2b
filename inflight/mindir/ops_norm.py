"""Matrix products and normalisations."""

from __future__ import annotations

from inflight.mindir.emitter import Tensor
from inflight.mindir.model import Opaque
from inflight.mindir.op import Op, Value, maps
from inflight.mindir.ops_math import floating


def swap_last(op: Op, value: Tensor) -> Tensor:
    """The tensor with its last two axes swapped."""
    order = [*range(value.rank - 2), value.rank - 1, value.rank - 2]
    return op.graph.node("Transpose", value, same=False, perm=order)


def _only(op: Op, first: Tensor, count: int) -> tuple[Value, ...]:
    """A tuple of results of which only the first can be used: the others belong to training."""
    return (first, *(Opaque(f"result {index} of {op.primitive}") for index in range(1, count)))


@maps("MatMul", "BatchMatMul", "MatMulExt", "BatchMatMulExt", "BmmExt", "Mm", "Mv")
def _matmul(op: Op) -> Value:
    left, right = op.tensor(0), op.tensor(1)
    if op.primitive in ("MatMul", "BatchMatMul"):
        if op.flag(2, "transpose_a"):
            left = swap_last(op, left)
        if op.flag(3, "transpose_b"):
            right = swap_last(op, right)
    return op.graph.node("MatMul", left, right, same=False)


@maps("Dense", "Linear")
def _dense(op: Op) -> Value:
    """x · weightᵀ + bias."""
    product = op.graph.node("MatMul", op.tensor(0), swap_last(op, op.tensor(1)), same=False)
    bias = op.optional(2)
    return product if bias is None else op.graph.node("Add", product, bias, same=False)


@maps("Addmm", "Baddbmm", "Addbmm", "Addmv")
def _addmm(op: Op) -> Value:
    """beta · input + alpha · (a · b)."""
    base = op.tensor(0)
    product = op.graph.node("MatMul", op.tensor(1), op.tensor(2), same=False)
    if op.primitive == "Addbmm":
        product = op.graph.node("ReduceSum", product, op.graph.constant([0], "int64"), same=False, keepdims=0)
    beta, alpha = op.static(3, "beta", 1), op.static(4, "alpha", 1)
    if beta != 1:
        base = op.graph.node("Mul", base, op.to_tensor(beta, base.dtype))
    if alpha != 1:
        product = op.graph.node("Mul", product, op.to_tensor(alpha, product.dtype))
    return op.graph.node("Add", base, product, same=False)


@maps("BiasAdd")
def _bias_add(op: Op) -> Value:
    value, bias = op.tensor(0), op.tensor(1)
    op.require_channels_first(2, "data_format")
    if value.rank > 2:
        channels = op.graph.constant([-1] + [1] * (value.rank - 2), "int64")
        bias = op.graph.node("Reshape", bias, channels, same=False)
    return op.graph.node("Add", value, bias)


@maps("BatchNorm", "FusedBatchNorm")
def _batch_norm(op: Op) -> Value:
    if op.flag(5, "is_training"):
        op.refuse("the network was exported in training mode, call set_train(False) before the export")
    op.require_channels_first(8, "format")
    inputs = [op.tensor(index) for index in range(5)]
    return _only(op, op.graph.node("BatchNormalization", *inputs, epsilon=op.number(6, "epsilon", 1e-5)), 5)


@maps("BatchNormExt")
def _batch_norm_ext(op: Op) -> Value:
    if op.flag(5, "training"):
        op.refuse("the network was exported in training mode, call set_train(False) before the export")
    value, mean, variance = op.tensor(0), op.tensor(3), op.tensor(4)
    one, zero = op.to_tensor(1.0, mean.dtype), op.to_tensor(0.0, mean.dtype)
    size = op.graph.node("Shape", mean, dtype="int64", shape=(1,))
    scale = op.optional(1) or op.graph.node("Expand", one, size, shape=mean.shape)
    bias = op.optional(2) or op.graph.node("Expand", zero, size, shape=mean.shape)
    epsilon = op.number(7, "epsilon", 1e-5)
    return _only(op, op.graph.node("BatchNormalization", value, scale, bias, mean, variance, epsilon=epsilon), 3)


@maps("InstanceNorm")
def _instance_norm(op: Op) -> Value:
    # Statistics of the instance itself; inputs 3 and 4 are running ones that only training writes.
    inputs = [op.tensor(index) for index in range(3)]
    return _only(op, op.graph.node("InstanceNormalization", *inputs, epsilon=op.number(5, "epsilon", 1e-5)), 3)


@maps("LayerNorm", "LayerNormV3")
def _layer_norm(op: Op) -> Value:
    value = op.tensor(0)
    axis = op.axis(op.integer(3, "begin_norm_axis", 1), value.rank)
    params_axis = op.axis(op.integer(4, "begin_params_axis", 1), value.rank)
    epsilon = op.number(5, "epsilon", 1e-7)
    if axis == params_axis:
        inputs = (value, op.tensor(1), op.tensor(2))
        return _only(op, op.graph.node("LayerNormalization", *inputs, axis=axis, epsilon=epsilon), 3)
    axes = op.graph.constant(list(range(axis, value.rank)), "int64")
    mean = op.graph.node("ReduceMean", value, axes, same=False, keepdims=1)
    centred = op.graph.node("Sub", value, mean)
    normal = op.graph.node("Mul", centred, _inverse_root(op, centred, axes, epsilon))
    scaled = op.graph.node("Mul", normal, op.tensor(1))
    return _only(op, op.graph.node("Add", scaled, op.tensor(2)), 3)


def _inverse_root(op: Op, value: Tensor, axes: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean of squares + epsilon) over the axes, which stay with size 1."""
    squares = op.graph.node("ReduceMean", op.graph.node("Mul", value, value), axes, same=False, keepdims=1)
    return op.graph.node(
        "Reciprocal", op.graph.node("Sqrt", op.graph.node("Add", squares, op.to_tensor(epsilon, value.dtype)))
    )


@maps("LayerNormExt")
def _layer_norm_ext(op: Op) -> Value:
    value = op.tensor(0)
    sizes = op.integers(1, "normalized_shape")
    scale = op.optional(2) or op.graph.constant([1.0], value.dtype)
    if scale.shape == (1,) and sizes != (1,):
        ones = op.graph.constant(list(sizes), "int64")
        scale = op.graph.node("Expand", scale, ones, shape=sizes)
    epsilon = op.number(4, "eps", 1e-5)
    normal = op.graph.node("LayerNormalization", value, scale, op.optional(3), axis=-len(sizes), epsilon=epsilon)
    return _only(op, normal, 3)


@maps("RmsNorm")
def _rms_norm(op: Op) -> Value:
    value, scale = op.tensor(0), op.tensor(1)
    axes = op.graph.constant(list(range(value.rank - scale.rank, value.rank)), "int64")
    normal = op.graph.node("Mul", value, _inverse_root(op, value, axes, op.number(2, "epsilon", 1e-6)))
    return _only(op, op.graph.node("Mul", normal, scale), 2)


@maps("GroupNorm")
def _group_norm(op: Op) -> Value:
    value, groups = op.tensor(0), op.count(op.integer(1, "num_groups"), "num_groups")
    flat = op.graph.node("Reshape", value, op.graph.constant([0, groups, -1], "int64"), shape=(-1, groups, -1))
    ones = op.graph.constant([1.0] * groups, value.dtype)
    zeros = op.graph.constant([0.0] * groups, value.dtype)
    normal = op.graph.node("InstanceNormalization", flat, ones, zeros, epsilon=op.number(4, "eps", 1e-5))
    size = op.graph.node("Shape", value, dtype="int64", shape=(value.rank,))
    result = op.graph.node("Reshape", normal, size, shape=value.shape)
    channels = op.graph.constant([-1] + [1] * (value.rank - 2), "int64")
    for index, kind in ((2, "Mul"), (3, "Add")):
        parameter = op.optional(index)
        if parameter is not None:
            result = op.graph.node(kind, result, op.graph.node("Reshape", parameter, channels, same=False))
    return _only(op, result, 3)


@maps("L2Normalize")
def _l2_normalize(op: Op) -> Value:
    """x / sqrt(max(sum of squares, epsilon))."""
    value = floating(op)
    axes = op.graph.constant(list(op.integers(1, "axis", 0)), "int64")
    squares = op.graph.node("ReduceSum", op.graph.node("Mul", value, value), axes, same=False, keepdims=1)
    floor = op.to_tensor(op.number(2, "epsilon", 1e-4), value.dtype)
    return op.graph.node("Div", value, op.graph.node("Sqrt", op.graph.node("Max", squares, floor)))
