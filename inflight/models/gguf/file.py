"""The header of a GGUF file, read without trust: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from inflight.errors import StartError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, the innermost dimension last.
        start, size: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """One file, mapped into memory.

    Attributes:
        metadata: by key.
        tensors: by llama.cpp's names.

    Raises:
        StartError: it is no GGUF file, or broken: nothing in it lies outside of it. The text names key or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise StartError(f"'{path}' cannot be read: {error}") from error
        self.size = len(self._map)
        try:
            self._read(_Cursor(self._map))
        except _Broken as problem:
            raise StartError(f"'{path}' is no whole GGUF file: {problem}; download it again") from None

    def bytes_of(self, info: TensorInfo) -> np.ndarray:
        """A tensor's bytes, uint8, read-only."""
        return np.frombuffer(self._map, np.uint8, info.size, info.start)

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != _MAGIC:
            raise _Broken("it does not begin with 'GGUF'")
        version = cursor.number("I")
        if version not in _VERSIONS:
            raise _Broken(f"its version is {version}, where {' or '.join(map(str, _VERSIONS))} belongs")
        tensors, pairs = cursor.count(24), cursor.count(12)
        for _ in range(pairs):
            key = cursor.text("a key")
            self.metadata[key] = cursor.value(cursor.number("I"), f"key '{key}'")
        found = [self._entry(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment > 1 << 20:
            raise _Broken(f"key 'general.alignment' is {alignment!r}")
        begin = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in found:
            self.tensors[name] = self._placed(name, shape, kind, begin + offset)

    @staticmethod
    def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text("a tensor's name")
        dimensions = cursor.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Broken(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, cursor.number("I"), cursor.number("Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        if name in self.tensors:
            raise _Broken(f"tensor '{name}' is there twice")
        try:
            type = GGMLQuantizationType(kind)
            block, octets = GGML_QUANT_SIZES[type]
        except (ValueError, KeyError):
            raise _Broken(f"tensor '{name}' is of the unknown type {kind}") from None
        rows = 1
        for size in shape[:-1]:
            rows *= size  # Python's integers do not overflow
        if not rows or not shape[-1] or shape[-1] % block:
            raise _Broken(f"tensor '{name}' of type {type.name} has shape {list(shape)}")
        size = rows * (shape[-1] // block) * octets
        if start + size > self.size:
            raise _Broken(f"tensor '{name}' of shape {list(shape)} ends at byte {start + size} of {self.size}")
        return TensorInfo(name, shape, type, start, size)


def whole_number(metadata: Mapping[str, Value], key: str, default: int | None = None) -> int:
    """A positive number of the metadata.

    Raises:
        StartError: there is none; the text names the key.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise StartError(f"the GGUF file's key '{key}' is {value!r}, where a whole number from 1 belongs")
    return value


class _Broken(Exception):
    """What is wrong with a file."""


class _Cursor:
    """Reads values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._data):
            raise _Broken(f"byte {end} is wanted of {len(self._data)}")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def number(self, form: str) -> int:
        value: int = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return value

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        count = self.number("Q")
        if count * least > len(self._data) - self.at:
            raise _Broken(f"{count} entries are said to follow in {len(self._data) - self.at} bytes")
        return count

    def text(self, what: str) -> str:
        try:
            return self.take(self.count(1)).decode()
        except UnicodeDecodeError:
            raise _Broken(f"{what} at byte {self.at} is no UTF-8") from None

    def value(self, kind: int, what: str) -> Value:
        if kind == _TEXT:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(self.number("I"), what)
        form = self._form(kind, what)
        value: bool | int | float = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return value

    def _array(self, kind: int, what: str) -> Value:
        if kind == _TEXT:
            return [self.text(what) for _ in range(self.count(8))]
        form = self._form(kind, what)
        count = self.count(struct.calcsize("<" + form))
        return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize("<" + form))))

    @staticmethod
    def _form(kind: int, what: str) -> str:
        form = _SCALARS.get(kind)
        if form is None:
            raise _Broken(f"{what} is of the unknown type {kind}")
        return form
