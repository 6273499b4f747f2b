"""Stage functions that a method names by a text instead of a function."""

from __future__ import annotations

import numpy as np

from inflight.contract import CODES, Array
from inflight.errors import InvalidRequest
from inflight.servable.spec import FunctionSpec

_UNORDERED = (np.dtype(np.bool_), np.dtype(np.float16))


def argmax_cpp(scores: Array) -> Array:
    """Index of the largest element of the flattened array, the first one of equals.

    Args:
        scores: integers, float32 or float64, any shape, not empty.

    Returns:
        int64 array without dimensions.

    Raises:
        InvalidRequest: no elements, or another type.
    """
    values = np.asarray(scores)
    if values.dtype not in CODES or values.dtype in _UNORDERED:
        raise InvalidRequest(
            f"argmax_cpp does not support the data type {values.dtype}, convert it to float32 in a stage before"
        )
    if values.size == 0:
        raise InvalidRequest("argmax_cpp got an empty array, it needs at least one element")
    return np.asarray(np.argmax(values), dtype=np.int64)


BUILTIN_FUNCTIONS: dict[str, FunctionSpec] = {
    "argmax_cpp": FunctionSpec("argmax_cpp", argmax_cpp, inputs_count=1, outputs_count=1, batched=False),
}
