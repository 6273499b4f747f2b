"""protobuf's encoding, for messages whose large fields stay where they are: protobuf would copy each of them twice.

A message is a sequence of fields: a tag, which is the field's number and its wire type, and the value, with its length
before it if it is bytes, a text or a message. (https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from inflight.contract import Array

LARGE = 64 * 1024
"""Bytes of a field from which it is not copied."""
MOST_FIELDS = 1024
"""Fields of a message that are looked at; one with more is left to protobuf."""
_BYTES = 2
_FIXED = {1: 8, 5: 4}
"""Wire types: with a length, and the sizes of those that are fixed."""
_NUMBER = 0


class Field(NamedTuple):
    """One field of a message: its tag, and where the field, its value and what follows begin."""

    tag: int
    begin: int
    value: int
    end: int


class Unusual(Exception):
    """A message that protobuf must read: it is wrong, or has too many fields."""


def tag_of(number: int) -> int:
    """The tag of a field of bytes, of a text or of a message."""
    return number << 3 | _BYTES


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a message, in order; of the beginning of one, those whose value begins in it.

    Raises:
        Unusual: as it says.
    """
    at = 0
    for _ in range(MOST_FIELDS):
        if at == len(data):
            return
        tag, value = _number(data, at)
        kind = tag & 7
        if kind == _BYTES:
            size, value = _number(data, value)
        elif kind == _NUMBER:
            size = _number(data, value)[1] - value
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise Unusual
        yield Field(tag, at, value, value + size)
        at = value + size
        if at > len(data):
            raise Unusual
    raise Unusual


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends: seven bits a byte, the lowest first."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise Unusual


def head(tag: int, size: int) -> bytes:
    """What stands before a value of `size` bytes."""
    found = bytearray((tag,))
    while size >= 0x80:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


def size_of(parts: Sequence[bytes | memoryview]) -> int:
    return sum(len(part) for part in parts)


def wrapped(tag: int, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """A field whose value is these parts."""
    return [head(tag, size_of(parts)), *parts]


def is_large(value: object) -> bool:
    """Whether a value is an array that is not copied."""
    return isinstance(value, np.ndarray) and value.nbytes >= LARGE


def memory(array: Array) -> bytes | memoryview:
    """An array's bytes in row-major order: its own memory if they lie there so."""
    if array.nbytes and array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8).data
    return array.tobytes()
