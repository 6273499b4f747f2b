"""Reads and checks one safetensors file: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from inflight.checkpoint.mapped import MappedFile
from inflight.errors import StartError

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
        "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
        "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip
_BITS = {**{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_LONGEST_HEADER = 100_000_000  # the library's limit
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: the file's name of its dtype, its shape, and the range of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """One file.

    Attributes:
        entries: by name.

    Raises:
        StartError: it cannot be read, or its header is wrong: a tensor lies outside of the file or over another tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = MappedFile(path)
            self.entries = self._read()
        except (OSError, ValueError, RecursionError, _BrokenError) as error:
            raise StartError(f"'{path}' cannot be read: {error}; is it whole? Download it again") from error

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view of a tensor in the file.

        Raises:
            StartError: its dtype is not supported.
        """
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise StartError(f"tensor '{name}' in '{self.path.name}' is stored as {entry.dtype}, which is not read")
        return self.file.view(entry.start, entry.size).view(dtype).reshape(entry.shape)

    def _read(self) -> dict[str, Entry]:
        if self.file.size < 8:
            raise _BrokenError("it is too short")
        length = int.from_bytes(self.file.taken(0, 8), "little")
        if length > min(_LONGEST_HEADER, self.file.size - 8):
            raise _BrokenError(f"its header is said to have {length} bytes")
        header = json.loads(self.file.taken(8, length))
        if not isinstance(header, dict):
            raise _BrokenError("its header is no object")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, about, 8 + length) for name, about in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
            if entry.start != end:
                raise _BrokenError(f"tensor '{name}' begins at byte {entry.start}, where byte {end} is the next one")
            end += entry.size
        if end != self.file.size:
            raise _BrokenError(f"its tensors end at byte {end} of {self.file.size}")
        return entries


class _BrokenError(Exception):
    """A file is broken; the text says how."""


def _entry(name: str, about: Any, begin: int) -> Entry:
    if not isinstance(about, Mapping):
        raise _BrokenError(f"tensor '{name}' is no object")
    dtype = about.get("dtype")
    shape, offsets = _sizes(about.get("shape")), _sizes(about.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _BrokenError(f"tensor '{name}' is of the unknown dtype {str(dtype)[:40]!r}")
    if shape is None or len(shape) > _MOST_DIMENSIONS:
        raise _BrokenError(f"tensor '{name}' has the shape {str(about.get('shape'))[:80]}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _BrokenError(f"tensor '{name}' lies at {str(about.get('data_offsets'))[:80]}")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != 8 * size:
        raise _BrokenError(f"tensor '{name}' of shape {shape} and dtype {dtype} has {size} bytes")
    return Entry(dtype, tuple(shape), begin + offsets[0], size)


def _sizes(values: Any) -> list[int] | None:
    """A list of whole numbers >= 0; None for any other value."""
    right = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return list(values) if right else None
