"""Converts a JSON value to an input value: scalars, nested lists, and `{"b64": ..., "type": ..., "shape": [...]}`."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from inflight.contract import DTYPE_CODES, Array, Value
from inflight.errors import InvalidRequest
from inflight.frontends.json_arrays import (
    LEAVES,
    MAX_DIMS,
    content_error,
    integer_error,
    leaf_of,
    numeric_array,
    outline,
)

MAX_ELEMENTS = 2**32 - 1
MAX_SHOWN = 64
"""Characters of a client's own text that an error repeats."""

_NUMERIC: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in DTYPE_CODES}
_NUMERIC.update({"fp16": np.dtype("float16"), "fp32": np.dtype("float32"), "fp64": np.dtype("float64")})
_TYPES = (*_NUMERIC, "str", "bytes")


def value_of(value: Any, wanted: np.dtype[Any] | None = None) -> Value:
    """The input value of a JSON value.

    If the method declares a float type, numbers have that type; if it declares an integer type, whole numbers have it
    and fractions are float32. Without a declared type integers are int32 and floats float32, as in MindSpore Serving.
    Floats beyond their type's range are infinity. Arrays are writable and C-contiguous; those of `b64` are the decoded
    bytes themselves.

    Raises:
        InvalidRequest: the value has none of the forms of an input.
    """
    kind: Any = type(value)
    if kind is list:
        return _list_value(value, wanted)
    if kind is dict:
        return _b64_value(value)
    if kind is str:
        text: str = value
        return text
    if kind in LEAVES:
        leaf = leaf_of(kind, wanted)
        if not leaf.lowest <= value <= leaf.highest:
            if leaf.dtype.kind != "f":
                raise integer_error(value, leaf.dtype)
            with np.errstate(over="ignore"):
                return np.array(value, leaf.dtype)
        return np.array(value, leaf.dtype)
    raise content_error("json value is null, it is not supported")


def _list_value(value: list[Any], wanted: np.dtype[Any] | None) -> Value:
    shape, leaf = outline(value)
    if not shape:
        raise content_error(
            'json array, shape is empty: an array without elements is {"b64": "", "type": "float32", "shape": [0]}'
        )
    kind = type(leaf)
    if kind in LEAVES:
        return numeric_array(value, shape, kind, wanted)
    if kind is not str and kind is not dict:
        raise content_error("json array, data type is unknown: the first element is null or an empty array")
    if kind is dict and _type_name(leaf) in _NUMERIC:
        raise content_error("json array, item is object type, object only support string or bytes type")
    if math.prod(shape) != 1:
        raise content_error("json array, string or bytes type only support one item")
    item: Value = leaf if kind is str else _b64_value(leaf)
    _check_single(shape)
    return item


def _check_single(shape: tuple[int, ...]) -> None:
    if len(shape) > 1:
        # MindSpore Serving's text has these two blanks, and scripts compare with it.
        raise InvalidRequest(
            "Instance tensor check failed: bytes or string type input  shape can only be (1,) or empty, "
            f"but given shape is {list(shape)}"
        )


def _b64_value(value: dict[str, Any]) -> Value:
    if not value:
        raise content_error("json object, value is empty")
    if len(value) > 3:
        raise content_error("json object, items size is more than 3, only support specified ['b64', 'type', 'shape']")
    name = "bytes"
    shape: tuple[int, ...] = ()
    for key in sorted(value):
        if key == "type":
            name = _type_name(value)
        elif key == "shape":
            shape = _shape(value[key])
        elif key != "b64":
            raise content_error(f"json object, key is not ['b64', 'type', 'shape'], fail key:{shown(key)}")
    if "b64" not in value:
        raise content_error("json object, 'b64' should be specified only one time")
    encoded = value["b64"]
    dtype = _NUMERIC.get(name)
    if dtype is not None:
        return _array(_decode(encoded), dtype, shape)
    if math.prod(shape) != 1:
        raise content_error(
            "json object, only support scalar when data type is string or bytes, please check 'type' or 'shape'"
        )
    data = bytes(_decode(encoded))
    _check_single(shape)
    if name == "bytes":
        return data
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise content_error(f"json object, 'b64' of type 'str' is not valid UTF-8: {error}") from None


def _type_name(value: dict[str, Any]) -> str:
    name = value.get("type", "bytes")
    if type(name) is not str:
        raise content_error("json object, key is 'type', value should be string type")
    if name not in _TYPES:
        raise content_error(f"json object, specified type:'{shown(name)}' is illegal, use one of {', '.join(_TYPES)}")
    return name


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise content_error("json object, key is 'shape', value should be array type")
    for position, size in enumerate(value):
        if position and value[position - 1] == 0:
            raise content_error(
                f"json object, key is 'shape', invalid shape value {shown(str(value))}: only the last can be 0"
            )
        if type(size) is not int or size < 0:
            raise content_error("json object, key is 'shape', array value should be unsigned integer")
    if len(value) > MAX_DIMS or math.prod(size or 1 for size in value) > MAX_ELEMENTS:
        raise content_error(
            f"json object, key is 'shape', invalid shape value {shown(str(value))}: at most {MAX_DIMS} dimensions "
            f"and {MAX_ELEMENTS} elements are supported"
        )
    return tuple(value)


def _array(data: bytearray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    if len(data) != count * dtype.itemsize:
        raise content_error(
            f"size is not matched, decode base64 size:{len(data)}; Given info: type:{dtype.name}; "
            f"type size:{dtype.itemsize}; element nums:{count}"
        )
    if not data:
        return np.empty(shape, dtype)
    if dtype == np.bool_:
        # numpy works wrongly with a bool whose byte is neither 0 nor 1.
        return np.frombuffer(data, np.uint8).astype(np.bool_).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _decode(encoded: Any) -> bytearray:
    if type(encoded) is not str:
        raise content_error("get scalar data failed, type is string, but json is not string type")
    try:
        return msgspec.convert(encoded, bytearray)
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise content_error(
            f"'{shown(encoded)}' is illegal b64 encode string: use the standard alphabet, padded with '=' to a "
            "multiple of 4 characters"
        ) from None


def shown(text: str) -> str:
    """A client's own text, shortened for an error message: a whole image in base64 does not help."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
