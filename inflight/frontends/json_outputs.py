"""Output values as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import orjson

from inflight.contract import Array, MethodInfo, Row, Texts, Value
from inflight.errors import ModelError

SMALL = 32
"""Elements up to which a list of Python numbers is faster to write than an array."""
MAX_EMPTY_LISTS = 1_000_000
"""The largest number of `[]` that an array without elements is written as."""
KINDS = "fiub"
"""Kinds of numpy dtypes that JSON can write as numbers or booleans."""
OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS


def json_outputs(method: MethodInfo, row: Row, common: dict[str, Any]) -> bytes:
    """One instance's outputs by name, after the fields that every answer has; infinities as in `words`.

    Raises:
        ModelError: JSON cannot hold an output.
    """
    try:
        outputs = json_instance([spec.name for spec in method.outputs], row, _value_or_words)
        return orjson.dumps({**common, **outputs}, option=OPTIONS)
    except orjson.JSONEncodeError as error:
        raise ModelError(f"Failed to construct the response: {error}") from error


def words(array: Array) -> Any:
    """A float array as lists of JSON values: NaN as null, infinities as "Infinity" and "-Infinity", the words of
    protobuf's JSON form, which numpy and Python read as floats."""
    said = array.astype(object)  # numbers of the array's own type, so that each has its shortest text
    said[np.isposinf(array)], said[np.isneginf(array)], said[np.isnan(array)] = "Infinity", "-Infinity", None
    return said.tolist()


def _value_or_words(value: Value) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
        return words(value)
    return _value(value)


def json_instance(names: Sequence[str], row: Row, say: Callable[[Value], Any] | None = None) -> dict[str, Any]:
    if not names:
        raise ModelError("Failed to construct the response: reply instance items is empty")
    say = say or _value
    return {name: say(value) for name, value in zip(names, row, strict=True)}


def _value(value: Value) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"b64": msgspec.to_builtins(value)}
    if isinstance(value, Texts):
        return value.tolist(_value)
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype.kind not in KINDS:
        raise ModelError(
            f"Failed to construct the response: data type {dtype or type(value).__name__} is unknown, "
            "return numbers, booleans, str or bytes"
        )
    if not value.size:
        return _empty(value.shape)
    # float16 and float32 are written as the double they are equal to, so that a client reads the same number;
    # tolist() does so by itself.
    if value.size > SMALL and value.flags.c_contiguous and dtype.isnative:
        return value.astype(np.float64) if dtype.kind == "f" and dtype.itemsize < 8 else value
    return value.tolist()


def _empty(shape: tuple[int, ...]) -> Any:
    """The lists of an array without elements: `[]` at its first dimension of 0. If that is not the last dimension,
    MindSpore Serving writes null, which a client cannot tell from a missing value."""
    if math.prod(shape[: shape.index(0)]) > MAX_EMPTY_LISTS:
        raise ModelError(f"Failed to construct the response: an output of shape {list(shape)} has no elements")
    return np.empty(shape).tolist()
