"""Tensors of the Open Inference Protocol: datatypes, and the raw binary form that REST and gRPC share.

Raw form: the elements in row-major order, little-endian; BOOL takes one byte each; a BYTES element follows its length,
a 4-byte little-endian number.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from inflight.contract import Array
from inflight.errors import InvalidRequest

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""Numeric datatypes of the protocol. BYTES has no array type; BF16, which numpy has not, is sent raw only and
widened to float32."""
NUMPY_DATATYPES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DATATYPES.items()}

BF16 = "BF16"
_HALVES = np.dtype("<u2")
"""The upper halves of float32, which bfloat16 is."""

MAX_RANK = 32
MAX_ELEMENTS = 2**32 - 1
_LENGTH = struct.Struct("<I")


class OipTensor(msgspec.Struct, frozen=True):
    """A named tensor. (A msgspec struct, because making a frozen dataclass takes five times as long.)

    Attributes:
        datatype: a key of `DATATYPES`, BYTES, or BF16, whose `data` is float32.
        shape: dimensions; they match `data`.
        data: an array of this shape (read-only if it views received bytes), or for BYTES the elements in row-major
            order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array | list[bytes]


def check_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple.

    Raises:
        InvalidRequest: a negative dimension, too many dimensions, or dimensions too large.
    """
    if len(shape) > MAX_RANK or any(dim < 0 for dim in shape) or math.prod(dim for dim in shape if dim) > MAX_ELEMENTS:
        raise InvalidRequest(
            f"tensor '{name}' has the invalid shape {list(shape)}: at most {MAX_RANK} dimensions, none negative, "
            f"at most {MAX_ELEMENTS} elements"
        )
    return tuple(shape)


def numpy_dtype(name: str, datatype: str) -> np.dtype[Any]:
    """The array type of a numeric datatype.

    Raises:
        InvalidRequest: not a numeric datatype of the protocol.
    """
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        if datatype == BF16:
            raise InvalidRequest(f"tensor '{name}' of datatype BF16 must be sent as raw bytes, or as FP32")
        known = ", ".join(DATATYPES)
        raise InvalidRequest(f"tensor '{name}' has the unsupported datatype '{datatype}', use one of {known}, BYTES")
    return dtype


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> OipTensor:
    """A tensor from its raw form; the array views `raw`. That of BF16 is float32, with the same values.

    Raises:
        InvalidRequest: unknown datatype, or the size of `raw` does not match the shape.
    """
    dims = check_shape(name, shape)
    count = math.prod(dims)
    if datatype == "BYTES":
        return OipTensor(name, datatype, dims, _split_bytes(name, raw, count))
    dtype = _HALVES if datatype == BF16 else numpy_dtype(name, datatype)
    if len(raw) != count * dtype.itemsize:
        raise InvalidRequest(
            f"tensor '{name}' of datatype {datatype} and shape {list(dims)} takes {count * dtype.itemsize} bytes, "
            f"but {len(raw)} came"
        )
    if datatype == BF16:
        wide = np.frombuffer(raw, _HALVES).astype(np.uint32) << 16
        return OipTensor(name, datatype, dims, wide.view(np.float32).reshape(dims))
    return OipTensor(name, datatype, dims, np.frombuffer(raw, dtype).reshape(dims))


def to_raw(tensor: OipTensor) -> bytes:
    """The raw form of a tensor."""
    if isinstance(tensor.data, np.ndarray):
        return tensor.data.tobytes()
    return b"".join(part for item in tensor.data for part in (_LENGTH.pack(len(item)), item))


def from_elements(name: str, datatype: str, shape: Sequence[int], elements: Sequence[Any]) -> OipTensor:
    """A numeric tensor from its elements in row-major order; BYTES elements must be bytes.

    Raises:
        InvalidRequest: unknown datatype, a wrong number of elements, or an element out of the datatype's range.
    """
    dims = check_shape(name, shape)
    if len(elements) != math.prod(dims):
        raise InvalidRequest(
            f"tensor '{name}' of shape {list(dims)} takes {math.prod(dims)} elements, but {len(elements)} came"
        )
    if datatype == "BYTES":
        return OipTensor(name, datatype, dims, [bytes(element) for element in elements])
    dtype = numpy_dtype(name, datatype)
    try:
        if dtype.kind in "iu" and dims and elements:  # numpy 1 would only warn
            limits = np.iinfo(dtype)
            if min(elements) < limits.min or max(elements) > limits.max:
                raise OverflowError(f"{min(elements)} to {max(elements)} is beyond its range")
        with np.errstate(over="ignore"):
            return OipTensor(name, datatype, dims, np.array(elements, dtype).reshape(dims))
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidRequest(f"tensor '{name}' holds an element that is not {datatype}: {error}") from None


def _split_bytes(name: str, raw: bytes | memoryview, count: int) -> list[bytes]:
    """The elements of a BYTES tensor's raw form."""
    items: list[bytes] = []
    at = 0
    while at < len(raw):
        start = at + _LENGTH.size
        if len(raw) < start:
            break
        at = start + _LENGTH.unpack_from(raw, start - _LENGTH.size)[0]
        items.append(bytes(raw[start:at]))
    if at != len(raw) or len(items) != count:
        raise InvalidRequest(
            f"tensor '{name}' of datatype BYTES takes {count} elements, each after its length as a 4-byte "
            f"little-endian number, but the {len(raw)} bytes that came hold {len(items)}"
        )
    return items
