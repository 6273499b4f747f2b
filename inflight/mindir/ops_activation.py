"""Activations and their relatives."""

from __future__ import annotations

from collections.abc import Callable

from inflight.mindir.emitter import Tensor
from inflight.mindir.op import Op, Value, maps
from inflight.mindir.ops_math import floating, widened

_SELU_ALPHA, _SELU_GAMMA = 1.6732632423543772, 1.0507009873554805


def _plain(kind: str) -> Callable[[Op], Value]:
    return lambda op: op.graph.node(kind, floating(op))


for _kind, _names in {
    "Tanh": ("Tanh",),
    "Sigmoid": ("Sigmoid",),
    "HardSwish": ("HSwish",),
    "Softplus": ("Softplus",),
    "Softsign": ("Softsign", "SoftSign"),
}.items():
    maps(*_names)(_plain(_kind))


@maps("ReLU")
def _relu(op: Op) -> Value:
    return op.graph.node("Relu", widened(op))


def clip(op: Op, value: Tensor, low: float | None, high: float | None) -> Tensor:
    bounds = [None if bound is None else op.to_tensor(bound, value.dtype) for bound in (low, high)]
    return op.graph.node("Clip", value, *bounds)


@maps("ReLU6")
def _relu6(op: Op) -> Value:
    return clip(op, op.tensor(0), 0.0, 6.0)


@maps("Hardtanh")
def _hardtanh(op: Op) -> Value:
    return clip(op, op.tensor(0), op.number(1, "min_val", -1), op.number(2, "max_val", 1))


@maps("ClampScalar", "ClampTensor", "ClipByValue")
def _clamp(op: Op) -> Value:
    value = widened(op)
    low, high = op.optional(1, value.dtype), op.optional(2, value.dtype)
    if low is not None:
        value = op.graph.node("Max", value, low, same=False)
    return value if high is None else op.graph.node("Min", value, high, same=False)


@maps("HSigmoid", "HSigmoidExt")
def _hsigmoid(op: Op) -> Value:
    return op.graph.node("HardSigmoid", floating(op), alpha=1 / 6, beta=0.5)


@maps("Elu", "EluExt", "CeLU")
def _elu(op: Op) -> Value:
    value, alpha = op.tensor(0), op.number(1, "alpha", 1.0)
    return op.graph.node("Celu" if op.primitive == "CeLU" else "Elu", value, alpha=alpha)


@maps("SeLU", "SeLUExt")
def _selu(op: Op) -> Value:
    return op.graph.node("Selu", op.tensor(0), alpha=_SELU_ALPHA, gamma=_SELU_GAMMA)


@maps("LeakyReLU", "LeakyReLUExt", "LeakyRelu")
def _leaky_relu(op: Op) -> Value:
    name = "negative_slope" if "negative_slope" in op.attributes else "alpha"
    return op.graph.node("LeakyRelu", op.tensor(0), alpha=op.number(1, name, 0.01))


@maps("PReLU")
def _prelu(op: Op) -> Value:
    value, slope = op.tensor(0), op.tensor(1)
    if value.rank > 2:
        # One slope for each channel, which is axis 1.
        channels = op.graph.constant([-1] + [1] * (value.rank - 2), "int64")
        slope = op.graph.node("Reshape", slope, channels, same=False)
    return op.graph.node("PRelu", value, slope)


@maps("GeLU", "GeluExt", "Gelu")
def _gelu(op: Op) -> Value:
    # GeLU is the tanh form, GeluExt says which; 1 is MindSpore's number of `tanh`.
    tanh = op.primitive != "GeluExt" or op.static(1, "approximate", "none") in (1, "tanh")
    return op.graph.node("Gelu", floating(op), approximate="tanh" if tanh else "none")


@maps("FastGeLU", "FastGelu", "QuickGelu")
def _fast_gelu(op: Op) -> Value:
    value = floating(op)
    scaled = op.graph.node("Mul", value, op.to_tensor(1.702, value.dtype))
    return op.graph.node("Mul", value, op.graph.node("Sigmoid", scaled))


def _swish(op: Op, value: Tensor) -> Tensor:
    return op.graph.node("Mul", value, op.graph.node("Sigmoid", value))


@maps("SiLU", "Swish", "SiLUExt")
def _silu(op: Op) -> Value:
    return _swish(op, floating(op))


@maps("Mish", "MishExt")
def _mish(op: Op) -> Value:
    value = floating(op)
    return op.graph.node("Mul", value, op.graph.node("Tanh", op.graph.node("Softplus", value)))


@maps("LogSigmoid", "LogSigmoidExt")
def _log_sigmoid(op: Op) -> Value:
    return op.graph.node("Neg", op.graph.node("Softplus", op.graph.node("Neg", floating(op))))


@maps("SoftplusExt")
def _softplus_ext(op: Op) -> Value:
    value = op.tensor(0)
    beta = op.to_tensor(op.number(1, "beta", 1), value.dtype)
    threshold = op.to_tensor(op.number(2, "threshold", 20), value.dtype)
    scaled = op.graph.node("Mul", value, beta)
    smooth = op.graph.node("Div", op.graph.node("Softplus", scaled), beta)
    linear = op.graph.node("Greater", scaled, threshold, dtype="bool")
    return op.graph.node("Where", linear, value, smooth, dtype=value.dtype)


@maps("HShrink", "SoftShrink")
def _shrink(op: Op) -> Value:
    bound = op.number(1, "lambd", 0.5)
    bias = bound if op.primitive == "SoftShrink" else 0.0
    return op.graph.node("Shrink", op.tensor(0), lambd=bound, bias=bias)


@maps("Threshold")
def _threshold(op: Op) -> Value:
    value = op.tensor(0)
    above = op.graph.node("Greater", value, op.tensor(1, value.dtype), dtype="bool")
    return op.graph.node("Where", above, value, op.tensor(2, value.dtype), dtype=value.dtype)


@maps("Softmax", "SoftmaxExt")
def _softmax(op: Op) -> Value:
    return op.graph.node("Softmax", floating(op), axis=op.integer(1, "axis", -1))


@maps("LogSoftmax", "LogSoftmaxExt")
def _log_softmax(op: Op) -> Value:
    name = "dim" if op.primitive == "LogSoftmaxExt" else "axis"
    if op.static(1, name, -1) is None:
        op.refuse("without a dimension it is deprecated: export the model with one")
    return op.graph.node("LogSoftmax", floating(op), axis=op.integer(1, name, -1))


@maps("GLU", "Swiglu")
def _gated(op: Op) -> Value:
    value = op.tensor(0)
    axis = op.integer(1, "dim" if op.primitive == "Swiglu" else "axis", -1)
    left, right = op.graph.nodes("Split", [value], [(value.dtype, None)] * 2, {"axis": axis, "num_outputs": 2})
    if op.primitive == "Swiglu":
        return op.graph.node("Mul", _swish(op, left), right)
    return op.graph.node("Mul", left, op.graph.node("Sigmoid", right))
