"""How large the values of rows are, and how rows are divided between frames where all values travel inside of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from inflight.contract import Table, Texts
from inflight.link.codec import MAX_FRAME

T = TypeVar("T")

FRAME_VALUES = 64 << 20
"""Bytes of values in a frame with several rows, so that neither end holds a whole batch twice."""

MAX_VALUES = MAX_FRAME - (1 << 20)
"""Bytes of values that a frame can have."""


def row_bytes(row: object) -> int:
    """Bytes of the values of a row, or about as many; 0 for what is none, as an error."""
    if not isinstance(row, (list, tuple)):
        return 0
    size = 0
    for value in row:
        if isinstance(value, np.ndarray):
            size += value.nbytes
        elif isinstance(value, (bytes, str)):
            size += len(value)
        elif isinstance(value, Texts):
            size += sum(len(item) for item in value.items)
    return size


def parts(rows: Sequence[object], most: int = FRAME_VALUES) -> Iterator[tuple[int, int, int]]:
    """Divides rows into parts whose values have at most `most` bytes; a larger row is a part of its own.

    Returns:
        Of each part, in order: its first row, the one behind its last, its bytes.
    """
    if type(rows) is Table:
        each = sum(column.nbytes for column in rows.columns) // len(rows)
        step = max(1, most // max(1, each))
        for first in range(0, len(rows), step):
            last = min(len(rows), first + step)
            yield first, last, each * (last - first)
        return
    first = size = 0
    for at, row in enumerate(rows):
        more = row_bytes(row)
        if at > first and size + more > most:
            yield first, at, size
            first, size = at, 0
        size += more
    if first < len(rows):
        yield first, len(rows), size


def frames(pieces: Iterable[tuple[T, int]], most: int = FRAME_VALUES) -> Iterator[list[T]]:
    """Groups what comes with its bytes so that a group has at most `most` of them; a larger piece has its own group."""
    some: list[T] = []
    size = 0
    for piece, more in pieces:
        if some and size + more > most:
            yield some
            some, size = [], 0
        some.append(piece)
        size += more
    if some:
        yield some
