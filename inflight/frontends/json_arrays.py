"""Nested JSON lists to arrays.

Every leaf must be of the same JSON class as the first one and every list as long as the first one beside it; where a
method declares a float type, whole numbers and fractions are one class. These checks take most of the time, so there
are two ways: a plain loop for few elements; for many, `marshal` writes the nested lists as one regular byte string,
which numpy checks and converts without touching a Python object again. If either fails, a slow walk finds the error
for the client. With `marshal` a request of `python -m bench.classic --only replicas`, MindSpore form, takes 0.90 of the
processor time that it takes with the loop.
"""

from __future__ import annotations

import marshal
import math
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from inflight.contract import Array
from inflight.errors import InvalidRequest

MAX_DIMS = 32
"""The number of dimensions that every supported version of numpy can hold."""
SMALL = 256
"""Elements up to which the plain loop is faster."""
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

LEAVES: dict[type, np.dtype[Any]] = {
    float: np.dtype(np.float32),
    int: np.dtype(np.int32),
    bool: np.dtype(np.bool_),
}

_NUMBERS = frozenset({int, float})

# How marshal (version 2, which has no back references) writes a list, a float, a small int and the two booleans.
_MARSHAL_VERSION = 2
_LIST, _FLOAT, _INT, _TRUE, _FALSE = (ord(tag) for tag in "[giTF")
_RECORDS: dict[type, np.dtype[Any]] = {
    float: np.dtype([("tag", "u1"), ("value", "<f8")]),
    int: np.dtype([("tag", "u1"), ("value", "<i4")]),
    bool: np.dtype("u1"),
}


def content_error(text: str) -> InvalidRequest:
    """An error in a request's content, in MindSpore Serving's words."""
    return InvalidRequest(f"Parser request failed, {text}")


def integer_error(value: int, target: np.dtype[Any] = LEAVES[int]) -> InvalidRequest:
    if target != LEAVES[int]:
        return content_error(f"json integer {value} is out of the range of {target.name}, which the method takes here")
    return content_error(
        f"json integer {value} is out of the range of int32, which plain integers are read as: send it as "
        '{"b64": "<base64 of the raw bytes>", "type": "int64", "shape": [...]}'
    )


def outline(value: list[Any]) -> tuple[tuple[int, ...], Any]:
    """The shape by the first element at each depth, and the first leaf. The leaf is a list if that list is empty."""
    shape: list[int] = []
    item: Any = value
    while type(item) is list and item:
        shape.append(len(item))
        item = item[0]
    return tuple(shape), item


class Leaf(NamedTuple):
    """The type that JSON leaves are converted to.

    Attributes:
        kinds: classes of JSON values that one list may mix.
        lowest, highest: the limits of the type; floats beyond are infinity, integers beyond are errors.
    """

    dtype: np.dtype[Any]
    kinds: frozenset[type]
    lowest: float
    highest: float


@lru_cache(maxsize=256)
def leaf_of(kind: type, wanted: np.dtype[Any] | None) -> Leaf:
    """The type for leaves whose first one is of class `kind`: `wanted` if it can hold such numbers, else float32, int32
    or bool."""
    dtype, kinds = LEAVES[kind], frozenset({kind})
    if wanted is not None and kind is not bool:
        if wanted.kind == "f":
            dtype, kinds = wanted, _NUMBERS
        elif wanted.kind in "iu" and kind is int:
            dtype = wanted
    if dtype.kind == "b":
        return Leaf(dtype, kinds, False, True)
    if dtype.kind == "f":
        return Leaf(dtype, kinds, -float(np.finfo(dtype).max), float(np.finfo(dtype).max))
    return Leaf(dtype, kinds, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def numeric_array(value: list[Any], shape: tuple[int, ...], kind: type, wanted: np.dtype[Any] | None = None) -> Array:
    """The array of nested lists of numbers or booleans, writable, C-contiguous; see `leaf_of`.

    Floats beyond the type become infinity.

    Args:
        value: nested lists, at least one element.
        shape: what `outline` found.
        kind: class of the first leaf, a key of `LEAVES`.
        wanted: the numeric type that the method declares, if any.

    Raises:
        InvalidRequest: ragged lists, leaves of different classes, integers outside their type, too many dimensions.
    """
    if len(shape) > MAX_DIMS:
        raise content_error(f"json array, {len(shape)} dimensions are too many, at most {MAX_DIMS} are supported")
    array = regular_array(value, shape, kind, wanted)
    if array is not None:
        return array
    leaf = leaf_of(kind, wanted)
    error = _first_error(value, shape, kind, leaf, 0)
    if error is not None:
        raise error
    with np.errstate(over="ignore"):
        return np.array(value, leaf.dtype)


def regular_array(
    value: list[Any], shape: tuple[int, ...], kind: type, wanted: np.dtype[Any] | None = None
) -> Array | None:
    """As `numeric_array` for regular lists; None if anything is wrong or unusual."""
    convert = _convert_few if math.prod(shape) <= SMALL else _convert_many
    return convert(value, shape, kind, leaf_of(kind, wanted))


def _convert_few(value: list[Any], shape: tuple[int, ...], kind: type, leaf: Leaf) -> Array | None:
    """The array by a plain loop; None if anything is wrong or out of the range of the array's type."""
    flat = value
    for size in shape[1:]:
        for row in flat:
            if type(row) is not list or len(row) != size:
                return None
        flat = [*chain.from_iterable(flat)]
    dtype, kinds, lowest, highest = leaf
    if not kinds.issuperset(map(type, flat)) or min(flat) < lowest or max(flat) > highest:
        return None
    array = np.array(flat, dtype)  # numpy would walk nested lists twice
    return array.reshape(shape) if len(shape) > 1 else array


def _convert_many(value: list[Any], shape: tuple[int, ...], kind: type, leaf: Leaf) -> Array | None:
    """The array by `marshal`; None if the bytes are not exactly those of regular lists of one class."""
    try:
        record = _record(shape, kind)
        packed = marshal.dumps(value, _MARSHAL_VERSION)
    except ValueError:  # the shape is too large for numpy, or the lists are nested too deeply for marshal
        return None
    if len(packed) != record.itemsize:
        return None
    level = np.frombuffer(packed, record)
    # The outer tags and lengths fix where the inner ones are, so checking each level proves the whole layout.
    for size in shape:
        if (level["tag"] != _LIST).any() or (level["length"] != size).any():
            return None
        level = level["items"]
    if kind is bool:
        array = level == _TRUE
        return array.reshape(shape) if (array | (level == _FALSE)).all() else None
    if (level["tag"] != (_FLOAT if kind is float else _INT)).any():
        return None
    numbers = level["value"]
    if kind is int and leaf.dtype != LEAVES[int] and (numbers.min() < leaf.lowest or numbers.max() > leaf.highest):
        return None
    with np.errstate(over="ignore"):
        return numbers.astype(leaf.dtype, order="C").reshape(shape)


@lru_cache(maxsize=256)
def _record(shape: tuple[int, ...], kind: type) -> np.dtype[Any]:
    """marshal's layout of nested lists of that shape, as a structured dtype."""
    record = _RECORDS[kind]
    for size in reversed(shape):
        record = np.dtype([("tag", "u1"), ("length", "<u4"), ("items", record, (size,))])
    return record


def _first_error(value: Any, shape: tuple[int, ...], kind: type, leaf: Leaf, depth: int) -> InvalidRequest | None:
    """The first error, reading from left to right; None if there is none."""
    if type(value) is not list:
        return content_error(f"invalid json array: json type is not array, at dim {depth} of {list(shape)}")
    if len(value) != shape[depth]:
        return content_error(
            f"invalid json array: json size is {len(value)}, the dim {depth} expected to be {shape[depth]}"
        )
    if depth + 1 < len(shape):
        errors = (_first_error(item, shape, kind, leaf, depth + 1) for item in value)
        return next((error for error in errors if error is not None), None)
    for item in value:
        error = _leaf_error(item, kind, leaf)
        if error is not None:
            return error
    return None


def _leaf_error(item: Any, kind: type, leaf: Leaf) -> InvalidRequest | None:
    found = type(item)
    if found is not str and found not in LEAVES:
        return content_error("json array, data should be number, bool, string or bytes")
    if found not in leaf.kinds:
        return content_error(
            f"json array, elements type is not equal: the first is {_NAMES[kind]}, then comes {_NAMES[found]}"
        )
    if leaf.dtype.kind in "iu" and not leaf.lowest <= item <= leaf.highest:
        return integer_error(item, leaf.dtype)
    return None


_NAMES: dict[type, str] = {float: "a float (1.0)", int: "an integer (1)", bool: "a bool (true)", str: "a string"}
