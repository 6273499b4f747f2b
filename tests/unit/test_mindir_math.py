"""Mappings of element-wise, activating and reducing primitives, against their meaning written in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.unit.mindir_reference as ref
from tests.unit.mindir_builder import Arg, Const, check_primitive

RNG = np.random.default_rng(7)


def f32(*shape: int, low: float = -3.0, high: float = 3.0) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(np.float32)


X, Y = f32(3, 4), f32(3, 4)
POSITIVE = f32(3, 4, low=0.1, high=5)
UNIT = f32(3, 4, low=-0.9, high=0.9)
WHOLE = np.array([[7, -7, 8], [-9, 3, 0]], np.int32)
DIVISOR = np.array([[3, 3, -3], [-2, -5, 4]], np.int32)
TRUTH = np.array([True, False, True, False])
OTHER_TRUTH = np.array([True, True, False, False])

BINARY = [
    ("Add", X + Y),
    ("Sub", X - Y),
    ("Mul", X * Y),
    ("Div", X / Y),
    ("RealDiv", X / Y),
    ("FloorDiv", np.floor(X / Y)),
    ("FloorMod", np.mod(X, Y)),
    ("Mod", np.fmod(X, Y)),
    ("Maximum", np.maximum(X, Y)),
    ("Minimum", np.minimum(X, Y)),
    ("SquaredDifference", (X - Y) ** 2),
    ("Equal", X == Y),
    ("NotEqual", X != Y),
    ("Greater", X > Y),
    ("GreaterEqual", X >= Y),
    ("Less", X < Y),
    ("LessEqual", X <= Y),
]


@pytest.mark.parametrize(("name", "expected"), BINARY, ids=[item[0] for item in BINARY])
def test_binary(tmp_path: Path, name: str, expected: np.ndarray) -> None:
    check_primitive(tmp_path, name, [X, Y], expected)


def test_binary_broadcasts(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Add", [X, Y[0]], X + Y[0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
def test_integer_division_and_remainders(tmp_path: Path, dtype: str) -> None:
    a, b = WHOLE.astype(dtype), DIVISOR.astype(dtype)
    if dtype == "uint8":
        a, b = np.abs(WHOLE).astype(dtype), np.abs(DIVISOR).astype(dtype)
    check_primitive(tmp_path, "Div", [a, b], np.trunc(a / b).astype(dtype))
    check_primitive(tmp_path, "FloorDiv", [a, b], a // b)
    check_primitive(tmp_path, "FloorMod", [a, b], a % b)
    check_primitive(tmp_path, "Mod", [a, b], np.fmod(a, b))


def test_division_of_integers_to_a_real_number(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Div", [WHOLE, DIVISOR], (WHOLE / DIVISOR).astype(np.float32))


def test_small_integers_wrap_as_in_numpy(tmp_path: Path) -> None:
    a = np.array([250, 3], np.uint8)
    check_primitive(tmp_path, "Add", [a, np.array([10, 4], np.uint8)], np.array([4, 7], np.uint8))


SCALAR = [
    ("Adds", 2.5, X + 2.5),
    ("Subs", 2.5, X - 2.5),
    ("Muls", 2.5, X * 2.5),
    ("Divs", 2.5, X / 2.5),
    ("PowTensorScalar", 2.0, X**2),
    ("LessScalar", 1, X < 1),
    ("GreaterScalar", 1, X > 1),
    ("LessEqualScalar", 1.0, X <= 1),
    ("GreaterEqualScalar", 1.0, X >= 1),
    ("EqScalar", 1.0, X == 1),
    ("NeScalar", 1.0, X != 1),
    ("RemainderTensorScalar", 2, np.mod(X, 2)),
    ("FmodScalar", 2, np.fmod(X, 2)),
]


@pytest.mark.parametrize(("name", "scalar", "expected"), SCALAR, ids=[item[0] for item in SCALAR])
def test_tensor_with_scalar(tmp_path: Path, name: str, scalar: Any, expected: np.ndarray) -> None:
    check_primitive(tmp_path, name, [X, Const(scalar)], expected, typed=True)
    check_primitive(tmp_path, name, [X, Const(scalar)], expected, typed=False)


def test_a_real_scalar_turns_integers_into_reals(tmp_path: Path) -> None:
    expected = (WHOLE * 0.5).astype(np.float32)
    check_primitive(tmp_path, "Mul", [WHOLE, Const(0.5)], expected, typed=False)
    check_primitive(tmp_path, "Less", [WHOLE, Const(3.5)], WHOLE < 3.5, typed=False)


def test_scaled_sums(tmp_path: Path) -> None:
    check_primitive(tmp_path, "AddExt", [X, Y, Const(2)], X + 2 * Y)
    check_primitive(tmp_path, "SubExt", [X, Y, Const(0.5)], X - 0.5 * Y)
    check_primitive(tmp_path, "AddN", [X, Y], X + Y)


def test_rounded_division(tmp_path: Path) -> None:
    check_primitive(tmp_path, "DivMod", [X, Y, Const(None)], X / Y)
    check_primitive(tmp_path, "DivMod", [X, Y, Const(2)], np.floor(X / Y))
    check_primitive(tmp_path, "DivMod", [X, Y, Const(1)], np.trunc(X / Y))
    check_primitive(tmp_path, "DivMod", [WHOLE, DIVISOR, Const(1)], np.trunc(WHOLE / DIVISOR).astype(np.int32))


def test_division_by_zero_without_nan(tmp_path: Path) -> None:
    divisor = np.array([2, 0, 4], np.float32)
    check_primitive(tmp_path, "DivNoNan", [X[0, :3], divisor], np.array([X[0, 0] / 2, 0, X[0, 2] / 4], np.float32))


def test_logic(tmp_path: Path) -> None:
    check_primitive(tmp_path, "LogicalAnd", [TRUTH, OTHER_TRUTH], TRUTH & OTHER_TRUTH)
    check_primitive(tmp_path, "LogicalOr", [TRUTH, OTHER_TRUTH], TRUTH | OTHER_TRUTH)
    check_primitive(tmp_path, "LogicalXor", [TRUTH, OTHER_TRUTH], TRUTH ^ OTHER_TRUTH)
    check_primitive(tmp_path, "LogicalNot", [TRUTH], ~TRUTH)
    check_primitive(tmp_path, "Equal", [TRUTH, OTHER_TRUTH], TRUTH == OTHER_TRUTH)


UNARY: list[tuple[str, np.ndarray, Any]] = [
    ("Exp", X, np.exp),
    ("Log", POSITIVE, np.log),
    ("Sqrt", POSITIVE, np.sqrt),
    ("Rsqrt", POSITIVE, lambda x: 1 / np.sqrt(x)),
    ("Square", X, np.square),
    ("Neg", X, np.negative),
    ("Abs", X, np.abs),
    ("Reciprocal", POSITIVE, lambda x: 1 / x),
    ("Sign", X, np.sign),
    ("Floor", X, np.floor),
    ("Ceil", X, np.ceil),
    ("Round", np.array([0.5, 1.5, 2.5, -0.5, 1.2], np.float32), np.round),
    ("Trunc", X, np.trunc),
    ("Erf", X, ref.erf),
    ("Erfc", X, lambda x: 1 - ref.erf(x)),
    ("Sin", X, np.sin),
    ("Cos", X, np.cos),
    ("Tan", UNIT, np.tan),
    ("Sinh", X, np.sinh),
    ("Cosh", X, np.cosh),
    ("Asin", UNIT, np.arcsin),
    ("ACos", UNIT, np.arccos),
    ("Atan", X, np.arctan),
    ("Asinh", X, np.arcsinh),
    ("Acosh", POSITIVE + 1, np.arccosh),
    ("Atanh", UNIT, np.arctanh),
    ("Expm1", X, np.expm1),
    ("Exp2", X, np.exp2),
    ("Log1p", POSITIVE, np.log1p),
    ("Log2", POSITIVE, np.log2),
    ("Log10", POSITIVE, np.log10),
    ("Tanh", X, np.tanh),
    ("Sigmoid", X, ref.sigmoid),
    ("ReLU", X, lambda x: np.maximum(x, 0)),
    ("ReLU6", 4 * X, lambda x: np.clip(x, 0, 6)),
    ("HSwish", 2 * X, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    ("HSigmoid", 2 * X, lambda x: np.clip(x + 3, 0, 6) / 6),
    ("Softplus", X, ref.softplus),
    ("Softsign", X, lambda x: x / (1 + np.abs(x))),
    ("GeLU", X, ref.gelu_tanh),
    ("FastGeLU", X, lambda x: x * ref.sigmoid(1.702 * x)),
    ("SiLU", X, lambda x: x * ref.sigmoid(x)),
    ("Mish", X, lambda x: x * np.tanh(ref.softplus(x))),
    ("LogSigmoid", X, lambda x: np.log(ref.sigmoid(x))),
    ("SeLUExt", X, lambda x: 1.05070098 * np.where(x > 0, x, 1.67326324 * np.expm1(x))),
]


@pytest.mark.parametrize(("name", "x", "function"), UNARY, ids=[item[0] for item in UNARY])
def test_unary(tmp_path: Path, name: str, x: np.ndarray, function: Any) -> None:
    check_primitive(tmp_path, name, [x], function(x).astype(np.float32))


def test_unary_of_integers(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Abs", [WHOLE], np.abs(WHOLE))
    check_primitive(tmp_path, "Neg", [WHOLE.astype(np.int16)], -WHOLE.astype(np.int16))
    check_primitive(tmp_path, "Square", [WHOLE], WHOLE**2)
    check_primitive(tmp_path, "Exp", [WHOLE], np.exp(WHOLE.astype(np.float32)), rtol=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    x, y = X.astype(np.float16), Y.astype(np.float16)
    check_primitive(tmp_path, "Add", [x, y], x + y, rtol=1e-3, atol=1e-3)
    check_primitive(tmp_path, "GeLU", [x], ref.gelu_tanh(X).astype(np.float16), rtol=5e-3, atol=5e-3)


def test_activations_with_arguments(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Elu", [X, Arg("alpha", 1.5)], np.where(X > 0, X, 1.5 * np.expm1(X)).astype(np.float32))
    leaky = np.where(X > 0, X, 0.2 * X).astype(np.float32)
    check_primitive(tmp_path, "LeakyReLUExt", [X, Arg("negative_slope", 0.2)], leaky)
    exact = (X * 0.5 * (1 + ref.erf(X / np.sqrt(2)))).astype(np.float32)
    check_primitive(tmp_path, "GeluExt", [X, Const(0)], exact)
    check_primitive(tmp_path, "GeluExt", [X, Const(1)], ref.gelu_tanh(X))
    check_primitive(tmp_path, "Softmax", [X, Arg("axis", (0,))], ref.softmax(X, 0))
    check_primitive(tmp_path, "Softmax", [X, Arg("axis", -1)], ref.softmax(X, 1))
    check_primitive(tmp_path, "LogSoftmax", [X, Arg("axis", 1)], np.log(ref.softmax(X, 1)))
    check_primitive(tmp_path, "Hardtanh", [X, Const(-1), Const(2)], np.clip(X, -1, 2))
    check_primitive(tmp_path, "ClampScalar", [X, Const(-1.0), Const(None)], np.maximum(X, -1))
    soft = np.where(2 * X > 1, X, ref.softplus(2 * X) / 2).astype(np.float32)
    check_primitive(tmp_path, "SoftplusExt", [X, Const(2), Const(1)], soft)
    check_primitive(tmp_path, "HShrink", [X, Arg("lambd", 1.0)], np.where(np.abs(X) > 1, X, 0).astype(np.float32))
    shrunk = (np.sign(X) * np.maximum(np.abs(X) - 1, 0)).astype(np.float32)
    check_primitive(tmp_path, "SoftShrink", [X, Arg("lambd", 1.0)], shrunk)
    check_primitive(tmp_path, "Threshold", [X, Const(0.5), Const(9.0)], np.where(X > 0.5, X, 9).astype(np.float32))
    check_primitive(tmp_path, "GLU", [X, Arg("axis", -1)], X[:, :2] * ref.sigmoid(X[:, 2:]))


def test_prelu_has_one_slope_for_each_channel(tmp_path: Path) -> None:
    x, slope = f32(2, 3, 4, 5), f32(3)
    expected = np.where(x > 0, x, x * slope[:, None, None])
    check_primitive(tmp_path, "PReLU", [x, slope], expected.astype(np.float32))


CUBE = f32(2, 3, 4)
REDUCE = [("ReduceMean", np.mean), ("ReduceSum", np.sum), ("ReduceMax", np.max), ("ReduceMin", np.min)]


@pytest.mark.parametrize(("name", "function"), [*REDUCE, ("ReduceProd", np.prod)])
def test_reductions(tmp_path: Path, name: str, function: Any) -> None:
    for axis, keep in ((1, False), ((0, 2), True), (-1, True)):
        wanted = np.asarray(function(CUBE, axis=axis, keepdims=keep), np.float32)
        # In old files too the axis is an input, and only keep_dims an attribute.
        check_primitive(tmp_path, name, [CUBE, Const(axis), Arg("keep_dims", keep)], wanted)
    check_primitive(tmp_path, name, [CUBE, Const(()), Arg("keep_dims", False)], np.float32(function(CUBE)).reshape(()))


def test_reductions_of_integers_and_truth(tmp_path: Path) -> None:
    check_primitive(tmp_path, "ReduceSum", [WHOLE, Const(1), Arg("keep_dims", False)], WHOLE.sum(1, dtype=np.int32))
    small = WHOLE.astype(np.int8)
    check_primitive(tmp_path, "ReduceMax", [small, Const(1), Arg("keep_dims", False)], small.max(1))
    truth = WHOLE > 0
    check_primitive(tmp_path, "ReduceAll", [truth, Const(1), Arg("keep_dims", True)], truth.all(1, keepdims=True))
    check_primitive(tmp_path, "ReduceAny", [truth, Const(0), Arg("keep_dims", False)], truth.any(0))


def test_reductions_of_mint(tmp_path: Path) -> None:
    modern: Any = {"styles": ("inputs",)}
    check_primitive(
        tmp_path, "SumExt", [WHOLE, Const(None), Const(False), Const(None)], np.int64(WHOLE.sum()).reshape(()), **modern
    )
    check_primitive(
        tmp_path, "MeanExt", [CUBE, Const((0, 1)), Const(True), Const(None)], CUBE.mean((0, 1), keepdims=True), **modern
    )
    check_primitive(tmp_path, "ProdExt", [CUBE, Const(1), Const(False), Const(None)], CUBE.prod(1), **modern)
    check_primitive(tmp_path, "Max", [CUBE], CUBE.max().reshape(()), **modern)
    logs = np.log(np.exp(CUBE).sum(1))
    check_primitive(tmp_path, "LogSumExp", [CUBE, Const(1), Const(False)], logs, **modern)
    check_primitive(
        tmp_path,
        "Norm",
        [CUBE, Const(2.0), Const((1,)), Const(False), Const(None)],
        np.sqrt((CUBE**2).sum(1)),
        **modern,
    )
    check_primitive(
        tmp_path, "Var", [CUBE, Const((1,)), Const(1), Const(True)], CUBE.var(1, ddof=1, keepdims=True), **modern
    )
    check_primitive(tmp_path, "Std", [CUBE, Const(None), Const(0), Const(False)], CUBE.std().reshape(()), **modern)
    check_primitive(
        tmp_path, "StdMean", [CUBE, Const(2), Const(1), Const(False)], CUBE.std(2, ddof=1), CUBE.mean(2), **modern
    )


def test_positions_of_extremes(tmp_path: Path) -> None:
    check_primitive(tmp_path, "Argmax", [CUBE, Arg("axis", 1)], CUBE.argmax(1).astype(np.int32))
    check_primitive(tmp_path, "Argmin", [CUBE, Arg("axis", -1)], CUBE.argmin(-1).astype(np.int32))
    check_primitive(tmp_path, "ArgMaxExt", [CUBE, Const(None), Const(False)], np.int64(CUBE.argmax()).reshape(()))
    check_primitive(tmp_path, "ArgMaxExt", [CUBE, Const(2), Const(True)], CUBE.argmax(2)[..., None])
    arguments = [CUBE, Arg("axis", 1), Arg("keep_dims", True)]
    position, best = CUBE.argmax(1)[:, None].astype(np.int32), CUBE.max(1, keepdims=True)
    check_primitive(tmp_path, "ArgMaxWithValue", arguments, position, best)
    check_primitive(tmp_path, "MinDim", [CUBE, Const(0), Const(False)], CUBE.min(0), CUBE.argmin(0))
    tie = np.array([[2.0, 5.0, 5.0]], np.float32)
    check_primitive(tmp_path, "Argmax", [tie, Arg("axis", 1)], np.array([1], np.int32))


def test_sorting(tmp_path: Path) -> None:
    order = np.argsort(-X, axis=-1)[:, :2]
    best = np.take_along_axis(X, order, -1)
    check_primitive(tmp_path, "TopK", [X, Const(2)], best, order.astype(np.int32), sorted=True)
    rising = np.argsort(X, axis=0)
    check_primitive(
        tmp_path, "TopkExt", [X, Const(2), Const(0), Const(False), Const(True)], np.sort(X, 0)[:2], rising[:2]
    )
    arguments = [X, Arg("axis", 0), Arg("descending", False)]
    check_primitive(tmp_path, "Sort", arguments, np.sort(X, 0), rising.astype(np.int32))


def test_running_sums(tmp_path: Path) -> None:
    plain = [X, Const(1), Arg("exclusive", False), Arg("reverse", False)]
    check_primitive(tmp_path, "CumSum", plain, X.cumsum(1))
    backward = X[:, ::-1].cumsum(1)[:, ::-1] - X
    check_primitive(tmp_path, "CumSum", [X, Const(1), Arg("exclusive", True), Arg("reverse", True)], backward)
    check_primitive(tmp_path, "CumsumExt", [WHOLE, Const(0), Const(None)], WHOLE.cumsum(0, dtype=np.int64))
