"""Small ONNX graphs whose first dimension is a batch, and many whose first dimension is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
_RANDOM = np.random.default_rng(5)

node = helper.make_node


def value(name: str, kind: int, shape: Sequence[int | str] | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def weights(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape).astype(np.float32)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, np.ndarray | np.generic | list[int]] | None = None,
) -> bytes:
    """A serialised model."""
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    made = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


X, Y = value("x", F32, ["n", 4]), value("y", F32, ["n", 4])
AXIS = {"a": np.int64(0)}


def gru() -> bytes:
    """Time steps first: [n, 1, 4] to [n, 1, 4]."""
    cell = node("GRU", ["x", "W", "R"], ["g"], hidden_size=4)
    return graph(
        [cell, node("Squeeze", ["g", "o"], ["y"])],
        [value("x", F32, ["n", 1, 4])],
        [value("y", F32, ["n", 1, 4])],
        {"W": weights(1, 12, 4), "R": weights(1, 12, 4), "o": [1]},
    )


def attention() -> bytes:
    """Every row looks at all others: [n, 1, 8], sequence first."""
    nodes = [
        node("Transpose", ["x"], ["b"], perm=[1, 0, 2]),
        node("Transpose", ["b"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["b", "k"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "b"], ["o"]),
        node("Transpose", ["o"], ["y"], perm=[1, 0, 2]),
    ]
    return graph(nodes, [value("x", F32, ["n", 1, 8])], [value("y", F32, ["n", 1, 8])])


def suppression() -> bytes:
    """Non-maximum suppression: as many rows of three indices as boxes are left."""
    inputs = [value("x", F32, ["n", "k", 4]), value("s", F32, ["n", 1, "k"])]
    constants = {"m": np.array([10]), "i": np.array([0.5], np.float32), "t": np.array([0.1], np.float32)}
    return graph(
        [node("NonMaxSuppression", ["x", "s", "m", "i", "t"], ["y"])], inputs, [value("y", I64, ["n", 3])], constants
    )


def endless_on_zeros() -> bytes:
    """y = 2x, by a loop that goes on while the sum of x is zero."""
    scalar = value("go", TensorProto.BOOL, [])
    body = helper.make_graph(
        [
            node("ReduceSum", ["x"], ["total"], keepdims=0),
            node("Equal", ["total", "zero"], ["again"]),
            node("Identity", ["x"], ["next"]),
        ],
        "body",
        [value("i", I64, []), scalar, value("held", F32, ["n", 4])],
        [value("again", TensorProto.BOOL, []), value("next", F32, ["n", 4])],
    )
    nodes = [
        node("Loop", ["", "start", "x"], ["last"], body=body),
        node("Add", ["last", "x"], ["y"]),
    ]
    return graph(nodes, [X], [Y], {"start": np.bool_(True), "zero": np.float32(0)})


BATCHED: dict[str, bytes] = {
    "dense": graph([node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], [X], [Y], {"w": weights(4, 4)}),
    "tokens": graph(
        [node("Gather", ["t", "x"], ["y"])],
        [value("x", I64, ["n", "s"])],
        [value("y", F32, ["n", "s", 8])],
        {"t": weights(2, 8)},
    ),
    "fixed": graph(
        [node("MatMul", ["x", "w"], ["y"])], [value("x", F32, [4, 4])], [value("y", F32, [4, 4])], {"w": weights(4, 4)}
    ),
    "label": graph([node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)], [X], [value("y", I64, ["n"])]),
}
"""Rows are independent."""

WHOLE: dict[str, bytes] = {
    "softmax": graph([node("Softmax", ["x"], ["y"], axis=0)], [X], [Y]),
    "running_sum": graph([node("CumSum", ["x", "a"], ["y"])], [X], [Y], AXIS),
    "rare_sum": graph(  # zeros for all small numbers
        [node("Sub", ["x", "t"], ["d"]), node("Relu", ["d"], ["h"]), node("CumSum", ["h", "a"], ["y"])],
        [X],
        [Y],
        {**AXIS, "t": np.float32(1000)},
    ),
    "now_and_then_a_sum": graph(  # x for all small numbers
        [
            node("Sub", ["x", "t"], ["d"]),
            node("Relu", ["d"], ["h"]),
            node("CumSum", ["h", "a"], ["c"]),
            node("Add", ["c", "x"], ["y"]),
        ],
        [X],
        [Y],
        {**AXIS, "t": np.float32(100)},
    ),
    "unique": graph([node("Unique", ["x"], ["y"], axis=0)], [X], [Y]),
    "gru": gru(),
    "attention": attention(),
    "suppression": suppression(),
    "centred": graph([node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])], [X], [Y]),
    "by_largest": graph([node("ReduceMax", ["x"], ["m"], keepdims=0), node("Div", ["x", "m"], ["y"])], [X], [Y]),
    "quantised": graph(
        [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        [X],
        [Y],
    ),
    "shared": graph(
        [node("ReduceMean", ["k"], ["m"], axes=[0]), node("Mul", ["x", "m"], ["y"])],
        [X, value("k", F32, ["m", 4])],
        [Y],
    ),
    "largest": graph([node("TopK", ["x", "k"], ["y", "i"], axis=0)], [X], [Y], {"k": [1]}),
    "places": graph([node("NonZero", ["x"], ["z"]), node("Transpose", ["z"], ["y"])], [X], [value("y", I64, ["n", 2])]),
    "pairs": graph([node("Reshape", ["x", "s"], ["y"])], [X], [value("y", F32, ["n", 8])], {"s": [-1, 8]}),
    "mean": graph([node("ReduceMean", ["x"], ["y"], keepdims=0)], [X], [value("y", F32, [])]),
    "fixed_softmax": graph(
        [node("Softmax", ["x"], ["y"], axis=0)], [value("x", F32, [4, 4])], [value("y", F32, [4, 4])]
    ),
    "matrix": graph(
        [node("Transpose", ["x"], ["t"]), node("Add", ["x", "t"], ["y"])],
        [value("x", F32, ["n", "n"])],
        [value("y", F32, ["n", "n"])],
    ),
    "mislabelled": graph(  # says [1, q], gives [w, 1, 4], and nothing in the graph contradicts it before it runs
        [
            node("Shape", ["x"], ["s"]),
            node("Compress", ["s", "all"], ["t"]),
            node("Gather", ["t", "order"], ["r"]),
            node("Compress", ["r", "all"], ["u"]),
            node("Transpose", ["x"], ["b"], perm=[2, 0, 1]),
            node("Reshape", ["b", "u"], ["y"]),
        ],
        [value("x", F32, [1, 4, "w"])],
        [value("y", F32, [1, "q"])],
        {"all": np.array([True] * 3), "order": [2, 0, 1]},
    ),
    "contradicted": graph(  # says [1, q], and the session knows better
        [node("Transpose", ["x"], ["y"], perm=[2, 0, 1])], [value("x", F32, [1, 4, "w"])], [value("y", F32, [1, "q"])]
    ),
    "nothing": graph([node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["y"])], [X], [Y]),
}
"""Rows depend on each other, or are none."""
