"""Reductions, positions of extremes, sorting and running sums."""

from __future__ import annotations

from inflight.mindir.emitter import Tensor
from inflight.mindir.op import Op, Value, maps
from inflight.mindir.ops_math import floating, widened


def _axes(op: Op, index: int, name: str) -> list[int] | None:
    """The axes to reduce; None: all."""
    given = op.static(index, name, None)
    if given is None or given == ():
        return None
    return list(op.integers(index, name))


def reduced(op: Op, kind: str, value: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    where = None if axes is None else op.graph.constant(axes, "int64")
    return op.graph.node(kind, value, where, same=False, keepdims=int(keep))


_CLASSIC = {
    "ReduceMean": "ReduceMean",
    "ReduceSum": "ReduceSum",
    "ReduceMax": "ReduceMax",
    "ReduceMin": "ReduceMin",
    "ReduceProd": "ReduceProd",
    "ReduceAll": "ReduceMin",
    "ReduceAny": "ReduceMax",
}


@maps(*_CLASSIC)
def _reduce(op: Op) -> Value:
    if op.flag(3, "skip_mode") and _axes(op, 1, "axis") is None:
        return op.tensor(0)
    # Of truth values: all is the least of them, any the greatest.
    value = op.tensor(0, "bool") if op.primitive in ("ReduceAll", "ReduceAny") else op.tensor(0)
    value = op.graph.cast(value, "int32") if value.dtype == "bool" else widened_value(op, value)
    return reduced(op, _CLASSIC[op.primitive], value, _axes(op, 1, "axis"), op.flag(2, "keep_dims"))


def widened_value(op: Op, value: Tensor) -> Tensor:
    return op.graph.cast(value, "int32") if value.dtype in ("int8", "uint8", "int16", "uint16") else value


_EXTENDED = {"SumExt": "ReduceSum", "MeanExt": "ReduceMean", "ProdExt": "ReduceProd"}


@maps(*_EXTENDED)
def _reduce_ext(op: Op) -> Value:
    """The result's dtype is computed in: small integers are summed as int64."""
    value = op.tensor(0)
    dtype = op.dtype or (value.dtype if value.is_float else "int64")
    return reduced(op, _EXTENDED[op.primitive], op.graph.cast(value, dtype), _axes(op, 1, "dim"), op.flag(2, "keepdim"))


@maps("Max", "Min")
def _extreme(op: Op) -> Value:
    return reduced(op, f"Reduce{op.primitive}", widened(op), None, False)


@maps("LogSumExp")
def _log_sum_exp(op: Op) -> Value:
    return reduced(op, "ReduceLogSumExp", floating(op), _axes(op, 1, "dim"), op.flag(2, "keepdim"))


@maps("EuclideanNorm")
def _euclidean(op: Op) -> Value:
    return reduced(op, "ReduceL2", floating(op), _axes(op, 1, "axes"), op.flag(2, "keep_dims"))


@maps("Norm", "LinalgVectorNorm", "LpNorm", "LpNormV2")
def _norm(op: Op) -> Value:
    """The 1-norm and the 2-norm."""
    if op.primitive == "LpNorm":
        order, axes, keep = op.number(2, "p", 2), _axes(op, 1, "axis"), op.flag(3, "keep_dims")
    else:
        order, axes, keep = op.number(1, "p", 2), _axes(op, 2, "dim"), op.flag(3, "keepdim")
    if order not in (1.0, 2.0):
        op.refuse(f"the norm of order {order} is not supported")
    return reduced(op, "ReduceL1" if order == 1.0 else "ReduceL2", floating(op), axes, keep)


def _variance(op: Op, value: Tensor, axes: list[int] | None, correction: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Variance and mean; the sum of squares is divided by count - correction."""
    mean = reduced(op, "ReduceMean", value, axes, True)
    centred = op.graph.node("Sub", value, mean)
    squares = op.graph.node("Mul", centred, centred)
    if correction == 0:
        result = reduced(op, "ReduceMean", squares, axes, keep)
    else:
        count = reduced(op, "ReduceSum", _ones(op, value), axes, True)
        divisor = op.graph.node("Sub", count, op.to_tensor(float(correction), value.dtype))
        # Every element is divided beforehand: `keep` does not matter for the shapes then.
        result = reduced(op, "ReduceSum", op.graph.node("Div", squares, divisor), axes, keep)
    return result, mean if keep else reduced(op, "ReduceMean", value, axes, False)


def _ones(op: Op, value: Tensor) -> Tensor:
    size = op.graph.node("Shape", value, dtype="int64", same=False)
    return op.graph.node("Expand", op.to_tensor(1.0, value.dtype), size, shape=value.shape)


@maps("Var", "Std", "VarMean", "StdMean")
def _var(op: Op) -> Value:
    correction = op.number(2, "correction", 1)
    result, mean = _variance(op, op.tensor(0), _axes(op, 1, "dim"), correction, op.flag(3, "keepdim"))
    if op.primitive.startswith("Std"):
        result = op.graph.node("Sqrt", result)
    return (result, mean) if op.primitive.endswith("Mean") else result


@maps("ReduceStd")
def _reduce_std(op: Op) -> Value:
    correction = 1.0 if op.flag(2, "unbiased", True) else 0.0
    result, mean = _variance(op, op.tensor(0), _axes(op, 1, "axis"), correction, op.flag(3, "keep_dims"))
    return op.graph.node("Sqrt", result), mean


def _position(op: Op, kind: str, value: Tensor, axis: int, keep: bool) -> Tensor:
    """The first position of the extreme, int64."""
    return op.graph.node(kind, value, dtype="int64", same=False, axis=axis, keepdims=int(keep))


@maps("Argmax", "ArgMax", "Argmin", "ArgMin")
def _argmax(op: Op) -> Value:
    kind = "ArgMax" if op.primitive.lower() == "argmax" else "ArgMin"
    position = _position(op, kind, widened(op), op.integer(1, "axis", -1), False)
    return position if op.dtype else op.graph.cast(position, "int32")


@maps("ArgMaxExt", "ArgMinExt")
def _argmax_ext(op: Op) -> Value:
    value, kind = widened(op), op.primitive[:-3]
    axis, keep = op.static(1, "dim", None), op.flag(2, "keepdim")
    if axis is None:
        value = op.graph.node("Reshape", value, op.graph.constant([-1], "int64"), shape=(-1,))
        axis, keep = 0, False
    return _position(op, kind, value, int(axis), keep)


@maps("ArgMaxWithValue", "ArgMinWithValue")
def _argmax_with_value(op: Op) -> Value:
    value, kind = widened(op), op.primitive[:6]
    axis, keep = op.integer(1, "axis", 0), op.flag(2, "keep_dims")
    position = op.graph.cast(_position(op, kind, value, axis, keep), "int32")
    return position, reduced(op, f"Reduce{kind[3:]}", value, [axis], keep)


@maps("MaxDim", "MinDim")
def _max_dim(op: Op) -> Value:
    value, kind = widened(op), op.primitive[:3]
    axis, keep = op.integer(1, "dim"), op.flag(2, "keepdim")
    return reduced(op, f"Reduce{kind}", value, [axis], keep), _position(op, f"Arg{kind}", value, axis, keep)


def _top(op: Op, value: Tensor, count: Tensor, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    vector = op.graph.node("Reshape", count, op.graph.constant([1], "int64"), shape=(1,))
    results = [(value.dtype, None), ("int64", None)]
    attributes = {"axis": axis, "largest": int(largest), "sorted": 1}
    values, positions = op.graph.nodes("TopK", [value, vector], results, attributes)
    return values, positions


@maps("TopK")
def _top_k(op: Op) -> Value:
    values, positions = _top(op, widened(op), op.to_tensor(op.value(1, "k"), "int64"), -1, True)
    return values, op.graph.cast(positions, "int32")


@maps("TopkExt")
def _top_k_ext(op: Op) -> Value:
    count = op.to_tensor(op.value(1, "k"), "int64")
    return _top(op, widened(op), count, op.integer(2, "dim", -1), op.flag(3, "largest", True))


@maps("Sort", "SortExt")
def _sort(op: Op) -> Value:
    value = widened(op)
    axis = op.integer(1, "dim" if op.primitive == "SortExt" else "axis", -1)
    size = op.graph.node("Shape", value, dtype="int64", same=False)
    where = op.graph.constant([op.axis(axis, value.rank)], "int64")
    count = op.graph.node("Gather", size, where, axis=0, shape=(1,))
    values, positions = _top(op, value, count, axis, op.flag(2, "descending"))
    return values, positions if op.primitive == "SortExt" else op.graph.cast(positions, "int32")


@maps("CumSum", "CumsumExt")
def _cumsum(op: Op) -> Value:
    name = "dim" if op.primitive == "CumsumExt" else "axis"
    axis = op.graph.constant(op.integer(1, name), "int64")
    value = op.tensor(0)
    value = op.graph.cast(value, op.dtype or value.dtype)
    if op.primitive == "CumsumExt":
        return op.graph.node("CumSum", value, axis)
    exclusive, reverse = op.flag(2, "exclusive"), op.flag(3, "reverse")
    return op.graph.node("CumSum", widened_value(op, value), axis, exclusive=int(exclusive), reverse=int(reverse))
