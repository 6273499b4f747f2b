"""Reads and checks the header of a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight.checkpoint.gguf.types import TYPES, Type
from inflight.checkpoint.mapped import Bytes, MappedFile
from inflight.errors import StartError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    number: struct.Struct("<" + form)
    for number, form in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_TEXT, _ARRAY = 8, 9
_SIZE, _KIND = _SCALARS[10], _SCALARS[4]
_MOST_DIMENSIONS = 4


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a file.

    Attributes:
        shape: the innermost dimension last.
        start, size: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    start: int
    size: int


@dataclass(frozen=True)
class TextArray:
    """Texts in a file: each a little-endian uint64, its size in bytes, and those bytes, which should be UTF-8.

    Attributes:
        buffer: the mapped file; all of the texts lie in it.
        start: the first byte.
        count: texts.
    """

    buffer: mmap.mmap
    start: int
    count: int


class Metadata(Mapping[str, Value]):
    """Values by key. Arrays are decoded on access: a vocabulary has hundreds of thousands of texts, which a reader of
    tensors does not need.

    Reading a text that is not UTF-8 raises StartError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, Value | _Array] = {}

    def __getitem__(self, key: str) -> Value:
        value = self._values[key]
        if isinstance(value, _Array):
            try:
                value = value.decoded(key)
            except _BrokenError as problem:
                raise _no_whole_file(self._path, problem) from None
            self._values[key] = value
        return value

    def array(self, key: str) -> TextArray | NDArray[Any] | None:
        """An array as it is stored, numbers as a copy; None if it is missing or was decoded already."""
        value = self._values.get(key)
        if not isinstance(value, _Array):
            return None
        if value.form is None:
            return TextArray(value.file.buffer, value.start, value.count)
        dtype = np.dtype(f"<{value.form.format[1:]}")
        numbers: NDArray[Any] = np.frombuffer(value.file.buffer, dtype, value.count, value.start).copy()
        return numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, key: str, value: Value | _Array) -> None:
        if key in self._values:
            raise _BrokenError(f"key '{key}' is there twice")
        self._values[key] = value


class GgufFile:
    """One file, mapped into memory.

    Attributes:
        metadata: by key.
        tensors: by llama.cpp's names.

    Raises:
        StartError: it is not a GGUF file, or broken: something lies outside of it or over something else. The text
            names key or tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = Metadata(path)
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._file = MappedFile(path)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise StartError(f"'{path}' cannot be read: {error}") from error
        try:
            self._read(_Cursor(self._file))
        except _BrokenError as problem:
            raise _no_whole_file(path, problem) from None
        self._file.release(0, self._file.size)

    def bytes_of(self, info: TensorInfo) -> Bytes:
        """A tensor's bytes, uint8, read-only."""
        self._file.expect(info.start, info.size)
        return self._file.view(info.start, info.size)

    def release(self, info: TensorInfo) -> None:
        """Releases the memory of a tensor that was read."""
        self._file.release(info.start, info.size)

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != _MAGIC:
            raise _BrokenError("it does not begin with 'GGUF'")
        version = cursor.number(_KIND)
        if version not in _VERSIONS:
            raise _BrokenError(f"its version is {version}, where {' or '.join(map(str, _VERSIONS))} belongs")
        tensors, pairs = cursor.count(24), cursor.count(12)
        for _ in range(pairs):
            key = cursor.text("a key")
            self.metadata.add(key, cursor.value(cursor.number(_KIND), f"key '{key}'"))
        found = [self._entry(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment > 1 << 20:
            raise _BrokenError(f"key 'general.alignment' is {alignment!r}")
        begin = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in found:
            if offset % alignment:
                raise _BrokenError(f"tensor '{name}' begins {offset} bytes on, which is no multiple of {alignment}")
            self.tensors[name] = self._placed(name, shape, kind, begin + offset)
        end = begin
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            if info.start < end:
                raise _BrokenError(f"tensor '{info.name}' at byte {info.start} lies over another one, to byte {end}")
            end = info.start + info.size

    @staticmethod
    def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text("a tensor's name")
        dimensions = cursor.number(_KIND)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _BrokenError(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(cursor.number(_SIZE) for _ in range(dimensions))[::-1]
        return name, shape, cursor.number(_KIND), cursor.number(_SIZE)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        if name in self.tensors:
            raise _BrokenError(f"tensor '{name}' is there twice")
        type = TYPES.get(kind)
        if type is None:
            raise _BrokenError(f"tensor '{name}' is of the unknown type {kind}")
        rows = 1
        for size in shape[:-1]:
            rows *= size  # Python's integers do not overflow
        if not rows or not shape[-1] or shape[-1] % type.values:
            raise _BrokenError(f"tensor '{name}' of type {type.name} has shape {list(shape)}")
        size = rows * (shape[-1] // type.values) * type.bytes
        if start + size > self._file.size:
            raise _BrokenError(
                f"tensor '{name}' of shape {list(shape)} ends at byte {start + size} of {self._file.size}"
            )
        return TensorInfo(name, shape, type, start, size)


def whole_number(metadata: Mapping[str, Value], key: str, default: int | None = None) -> int:
    """A positive number of the metadata.

    Raises:
        StartError: it is missing or not a positive whole number; the text names the key.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise StartError(f"the GGUF file's key '{key}' is {value!r}, where a whole number from 1 belongs")
    return value


def number(metadata: Mapping[str, Value], key: str, default: float = 0.0) -> float:
    """A number of the metadata.

    Raises:
        StartError: it is no number, or too large to be one of a model; the text names the key.
    """
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:  # nor NaN
        raise StartError(f"the GGUF file's key '{key}' is {value!r}, where a number belongs")
    return value


class _BrokenError(Exception):
    """A file is broken; the text says how."""


def _no_whole_file(path: Path, problem: Exception) -> StartError:
    return StartError(f"'{path}' is no whole GGUF file: {problem}; download it again")


@dataclass(frozen=True)
class _Array:
    """Values that were skipped: their place, and their type (None: texts)."""

    file: MappedFile
    start: int
    count: int
    form: struct.Struct | None

    def decoded(self, key: str) -> Value:
        data, at = self.file.buffer, self.start
        if self.form is not None:
            return list(struct.unpack_from(f"<{self.count}{self.form.format[1:]}", data, at))
        texts: list[str] = []
        unpack = _SIZE.unpack_from
        try:
            for _ in range(self.count):
                (size,) = unpack(data, at)
                at += 8 + size
                texts.append(data[at - size : at].decode())
        except UnicodeDecodeError:
            raise _BrokenError(f"key '{key}' at byte {at} is no UTF-8") from None
        return texts


class _Cursor:
    """Reads values one after the other, never past the end."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._data = file.buffer
        self._size = file.size
        self.at = 0

    def take(self, size: int) -> bytes:
        begin = self.at
        self._pass(size)
        return self._data[begin : self.at]

    def number(self, form: struct.Struct) -> Any:
        begin = self.at
        self._pass(form.size)
        return form.unpack_from(self._data, begin)[0]

    def count(self, least: int) -> int:
        """The number of items that follow, each of at least this many bytes."""
        count: int = self.number(_SIZE)
        if count * least > self._size - self.at:
            raise _BrokenError(f"{count} entries are said to follow in {self._size - self.at} bytes")
        return count

    def text(self, what: str) -> str:
        try:
            return self.take(self.count(1)).decode()
        except UnicodeDecodeError:
            raise _BrokenError(f"{what} at byte {self.at} is no UTF-8") from None

    def value(self, kind: int, what: str) -> Value | _Array:
        if kind == _TEXT:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(self.number(_KIND), what)
        value: bool | int | float = self.number(self._form(kind, what))
        return value

    def _array(self, kind: int, what: str) -> _Array:
        if kind == _TEXT:
            count = self.count(8)
            begin = self.at
            self._pass_texts(count, what)
            return _Array(self._file, begin, count, None)
        form = self._form(kind, what)
        count = self.count(form.size)
        begin = self.at
        self._pass(count * form.size)
        return _Array(self._file, begin, count, form)

    def _pass(self, size: int) -> None:
        end = self.at + size
        if end > self._size:
            raise _BrokenError(f"byte {end} is wanted of {self._size}")
        self.at = end

    def _pass_texts(self, count: int, what: str) -> None:
        """Skips texts without decoding them, in about 100 ns each."""
        unpack, data, at, last = _SIZE.unpack_from, self._data, self.at, self._size - 8
        for _ in range(count):
            if at > last:
                raise _BrokenError(f"{what}: byte {at + 8} is wanted of {self._size}")
            at += 8 + unpack(data, at)[0]
        if at > self._size:
            raise _BrokenError(f"{what}: byte {at} is wanted of {self._size}")
        self.at = at

    @staticmethod
    def _form(kind: int, what: str) -> struct.Struct:
        form = _SCALARS.get(kind)
        if form is None:
            raise _BrokenError(f"{what} is of the unknown type {kind}")
        return form
