"""Element-wise arithmetic, comparison and logic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from inflight.mindir.emitter import Tensor
from inflight.mindir.op import Op, Value, maps

# ONNX has most arithmetic for int32, int64 and floats only. The exporter's dtype narrows the result again.
_WIDER = {"bool": "int32", "int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32", "uint32": "int64"}


def _is_scalar(value: Value) -> bool:
    return isinstance(value, (bool, int, float))


def common_dtype(op: Op, *values: Value) -> str:
    """dtype in which tensors and Python scalars meet: a scalar never widens a tensor of its own kind."""
    arrays = [op.to_tensor(value).dtype for value in values if not _is_scalar(value)]
    scalars = [value for value in values if _is_scalar(value)]
    dtype = (
        np.result_type(*arrays).name if arrays else ("bool" if all(isinstance(s, bool) for s in scalars) else "int64")
    )
    if any(isinstance(value, float) for value in scalars) and not dtype.startswith("float"):
        return "float32"
    if dtype == "bool" and any(not isinstance(value, bool) for value in scalars):
        return "int64"
    return dtype


def operands(op: Op, *, arithmetic: bool = True) -> tuple[Tensor, Tensor]:
    """Both inputs in one dtype that ONNX computes with."""
    left, right = op.value(0, "x"), op.value(1, "y")
    dtype = common_dtype(op, left, right)
    if arithmetic and op.dtype is not None:
        dtype = op.dtype
    dtype = _WIDER.get(dtype, dtype)
    return op.to_tensor(left, dtype), op.to_tensor(right, dtype)


def floating(op: Op, index: int = 0) -> Tensor:
    """An input as floating point: as it is, or in the result's dtype."""
    value = op.tensor(index)
    if value.is_float:
        return value
    wanted = op.dtype
    return op.graph.cast(value, wanted if wanted is not None and wanted.startswith("float") else "float32")


def widened(op: Op, index: int = 0) -> Tensor:
    value = op.tensor(index)
    return op.graph.cast(value, _WIDER.get(value.dtype, value.dtype))


def _binary(kind: str) -> Callable[[Op], Value]:
    def convert(op: Op) -> Value:
        left, right = operands(op)
        return op.graph.node(kind, left, right, same=False)

    return convert


def _compare(kind: str, negate: bool = False) -> Callable[[Op], Value]:
    def convert(op: Op) -> Value:
        left, right = operands(op, arithmetic=False)
        result = op.graph.node(kind, left, right, dtype="bool", same=False)
        return op.graph.node("Not", result) if negate else result

    return convert


def _unary(kind: str) -> Callable[[Op], Value]:
    return lambda op: op.graph.node(kind, floating(op))


def _logic(kind: str) -> Callable[[Op], Value]:
    return lambda op: op.graph.node(kind, op.tensor(0, "bool"), op.tensor(1, "bool"), same=False)


for _kind, _names in {
    "Mul": ("Mul", "Muls", "ScalarMul"),
    "Pow": ("Pow", "PowTensorScalar", "PowScalarTensor", "ScalarPow"),
    "Max": ("Maximum", "ScalarMax"),
    "Min": ("Minimum", "ScalarMin"),
}.items():
    maps(*_names)(_binary(_kind))

maps("Equal", "EqualExt", "EqScalar", "EqualScalar", "ScalarEq")(_compare("Equal"))
maps("NotEqual", "NeScalar", "NotEqualScalar")(_compare("Equal", negate=True))
maps("Greater", "GreaterScalar", "ScalarGt")(_compare("Greater"))
maps("GreaterEqual", "GreaterEqualScalar", "ScalarGe")(_compare("GreaterOrEqual"))
maps("Less", "LessScalar", "ScalarLt")(_compare("Less"))
maps("LessEqual", "LessEqualScalar", "ScalarLe")(_compare("LessOrEqual"))
maps("LogicalAnd")(_logic("And"))
maps("LogicalOr")(_logic("Or"))
maps("LogicalXor")(_logic("Xor"))

for _kind in ("Exp", "Log", "Sqrt", "Floor", "Ceil", "Erf", "Reciprocal", "Sin", "Cos", "Tan", "Sinh", "Cosh"):
    maps(_kind)(_unary(_kind))
for _kind in ("Asin", "Atan", "Asinh", "Acosh", "Atanh"):
    maps(_kind, f"{_kind}Ext")(_unary(_kind))
maps("ACos", "AcosExt")(_unary("Acos"))


@maps("LogicalNot")
def _logical_not(op: Op) -> Value:
    return op.graph.node("Not", op.tensor(0, "bool"))


@maps("Add", "Adds", "AddExt", "AddScalar", "ScalarAdd", "AddV2")
def _add(op: Op) -> Value:
    return _plus_scaled(op, "Add")


@maps("Sub", "Subs", "SubExt", "SubScalar", "ScalarSub")
def _sub(op: Op) -> Value:
    return _plus_scaled(op, "Sub")


def _plus_scaled(op: Op, kind: str) -> Value:
    left, right = operands(op)
    alpha = op.static(2, "alpha", 1)
    if alpha != 1:
        right = op.graph.node("Mul", right, op.to_tensor(alpha, right.dtype))
    return op.graph.node(kind, left, right, same=False)


@maps("Div", "Divs", "RealDiv", "ScalarDiv")
def _div(op: Op) -> Value:
    # Of integers: where the result is one too, ONNX rounds toward zero as MindSpore does.
    left, right = operands(op)
    if op.primitive in ("RealDiv", "ScalarDiv") and op.dtype is None and not left.is_float:
        left, right = op.graph.cast(left, "float32"), op.graph.cast(right, "float32")
    return op.graph.node("Div", left, right, same=False)


@maps("DivMod", "DivMods")
def _div_rounded(op: Op) -> Value:
    mode = op.static(2, "rounding_mode", None)
    if mode is None:
        return _div(op)
    # The numbers are those of MindSpore's RoundingMode.
    if mode in (2, "floor"):
        return _floor_div(op)
    if mode not in (1, "trunc"):
        op.refuse(f"rounding mode {mode} is unknown")
    left, right = operands(op)
    quotient = op.graph.node("Div", left, right, same=False)
    return _truncated(op, quotient) if quotient.is_float else quotient


@maps("FloorDiv", "FloorDivScalar", "ScalarFloorDiv")
def _floor_div(op: Op) -> Value:
    left, right = operands(op)
    if left.is_float:
        return op.graph.node("Floor", op.graph.node("Div", left, right, same=False))
    # Exact: what is left after taking the floored remainder away divides without rest.
    whole = op.graph.node("Sub", left, _floored_remainder(op, left, right), same=False)
    return op.graph.node("Div", whole, right, same=False)


@maps("FloorMod", "ScalarMod", "RemainderTensorTensor", "RemainderTensorScalar", "RemainderScalarTensor")
def _floor_mod(op: Op) -> Value:
    return _floored_remainder(op, *operands(op))


def _floored_remainder(op: Op, left: Tensor, right: Tensor) -> Tensor:
    """The remainder that has the divisor's sign."""
    if not left.is_float:
        return op.graph.node("Mod", left, right, same=False)
    times = op.graph.node("Floor", op.graph.node("Div", left, right, same=False))
    return op.graph.node("Sub", left, op.graph.node("Mul", times, right, same=False), same=False)


@maps("Mod", "TruncateMod", "FmodTensor", "FmodScalar")
def _mod(op: Op) -> Value:
    """The remainder that has the dividend's sign, as in C."""
    left, right = operands(op)
    return op.graph.node("Mod", left, right, same=False, fmod=1)


@maps("Neg", "ScalarUsub")
def _neg(op: Op) -> Value:
    return op.graph.node("Neg", widened(op))


@maps("Abs")
def _abs(op: Op) -> Value:
    return op.graph.node("Abs", op.tensor(0))


@maps("Sign")
def _sign(op: Op) -> Value:
    return op.graph.node("Sign", widened(op))


@maps("Square")
def _square(op: Op) -> Value:
    value = widened(op)
    return op.graph.node("Mul", value, value)


@maps("Rsqrt")
def _rsqrt(op: Op) -> Value:
    return op.graph.node("Reciprocal", op.graph.node("Sqrt", floating(op)))


@maps("Round")
def _round(op: Op) -> Value:
    """Half goes to the even neighbour."""
    value = op.tensor(0)
    decimals = op.integer(1, "decimals", 0)
    if not value.is_float:
        if decimals < 0:
            op.refuse("integers rounded to tens are not supported")
        return value
    if decimals == 0:
        return op.graph.node("Round", value)
    factor = op.to_tensor(10.0**decimals, value.dtype)
    return op.graph.node("Div", op.graph.node("Round", op.graph.node("Mul", value, factor)), factor)


@maps("Trunc")
def _trunc(op: Op) -> Value:
    value = op.tensor(0)
    return _truncated(op, value) if value.is_float else value


def _truncated(op: Op, value: Tensor) -> Tensor:
    sign = op.graph.node("Sign", value)
    return op.graph.node("Mul", sign, op.graph.node("Floor", op.graph.node("Abs", value)))


@maps("Expm1")
def _expm1(op: Op) -> Value:
    value = op.graph.node("Exp", floating(op))
    return op.graph.node("Sub", value, op.to_tensor(1.0, value.dtype))


@maps("Exp2")
def _exp2(op: Op) -> Value:
    value = floating(op)
    return op.graph.node("Pow", op.to_tensor(2.0, value.dtype), value, shape=value.shape)


@maps("Log1p")
def _log1p(op: Op) -> Value:
    value = floating(op)
    return op.graph.node("Log", op.graph.node("Add", value, op.to_tensor(1.0, value.dtype)))


@maps("Log2", "Log10")
def _log_base(op: Op) -> Value:
    value = op.graph.node("Log", floating(op))
    return op.graph.node("Div", value, op.to_tensor(float(np.log(float(op.primitive[3:]))), value.dtype))


@maps("Erfc")
def _erfc(op: Op) -> Value:
    value = op.graph.node("Erf", floating(op))
    return op.graph.node("Sub", op.to_tensor(1.0, value.dtype), value, shape=value.shape)


@maps("SquaredDifference")
def _squared_difference(op: Op) -> Value:
    left, right = operands(op)
    difference = op.graph.node("Sub", left, right, same=False)
    return op.graph.node("Mul", difference, difference)


@maps("DivNoNan")
def _div_no_nan(op: Op) -> Value:
    left, right = operands(op)
    zero = op.to_tensor(0, right.dtype)
    quotient = op.graph.node("Div", left, right, same=False)
    by_zero = op.graph.node("Equal", right, zero, dtype="bool")
    return op.graph.node("Where", by_zero, zero, quotient, dtype=quotient.dtype, same=False)


@maps("AddN", "AccumulateNV2")
def _add_n(op: Op) -> Value:
    total, *others = op.tensors()
    for other in others:
        total = op.graph.node("Add", total, other)
    return total
