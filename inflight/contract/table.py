"""Rows of one form held as columns, so that many small rows cost what a few arrays cost.

A row of a table is made when somebody looks at it. Whoever needs all rows at once (a message, a model's batch, a reply)
asks `as_columns`, which finds the arrays that the rows came from again and copies nothing where they lie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from inflight.contract.values import Array, Row, Value


class Table:
    """Columns of equal length: column [n, ...] holds one input or output of n instances.

    Attributes:
        largest: bytes of the largest value in a row.
    """

    __slots__ = ("columns", "largest")

    def __init__(self, columns: Sequence[Array]) -> None:
        """`columns`: at least one, all with the same first dimension n >= 1."""
        self.columns = columns
        self.largest = max(column.nbytes for column in columns) // len(columns[0])

    def rows(self) -> list[TableRow]:
        """All rows, in order."""
        return [TableRow(self, index) for index in range(len(self.columns[0]))]


class TableRow(Sequence[Array]):
    """One row of a table; its values are views."""

    __slots__ = ("position", "table")

    def __init__(self, table: Table, position: int) -> None:
        self.table = table
        self.position = position

    def __len__(self) -> int:
        return len(self.table.columns)

    @overload
    def __getitem__(self, at: int) -> Array: ...
    @overload
    def __getitem__(self, at: slice) -> list[Array]: ...
    def __getitem__(self, at: int | slice) -> Array | list[Array]:
        if isinstance(at, slice):
            return list(self)[at]
        # The ellipsis keeps a single number an array.
        value: Array = self.table.columns[at][self.position, ...]
        return value

    def __iter__(self) -> Iterator[Array]:
        position = self.position
        for column in self.table.columns:
            yield column[position, ...]


def as_columns(rows: Sequence[Row]) -> list[Array] | None:
    """One array [n, ...] for each position of the n >= 1 rows.

    Neighbours in a table become slices of its columns; anything else is copied together.

    Returns:
        None where the rows are not all arrays, or differ in their number, dtypes or shapes.
    """
    parts: list[Sequence[Array]] = []
    single: list[Sequence[Value]] = []
    count, index = len(rows), 0
    while index < count:
        row = rows[index]
        index += 1
        if type(row) is not TableRow:
            single.append(row)
            continue
        if single and not _gather(single, parts):
            return None
        start = stop = row.position
        while index < count:
            after = rows[index]
            if type(after) is not TableRow or after.table is not row.table or after.position != stop + 1:
                break
            stop += 1
            index += 1
        parts.append([column[start : stop + 1] for column in row.table.columns])
    if single and not _gather(single, parts):
        return None
    if len(parts) == 1:
        return list(parts[0])
    first = parts[0]
    for part in parts:
        if len(part) != len(first):
            return None
        for one, other in zip(part, first):
            if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
                return None
    return [np.concatenate(columns) for columns in zip(*parts)]


def _gather(rows: list[Sequence[Value]], parts: list[Sequence[Array]]) -> bool:
    """Adds the columns of rows that are lists to `parts` and empties `rows`; False where they differ in form."""
    columns: list[Array] = []
    width = len(rows[0])
    if not width or any(len(row) != width for row in rows):
        return False
    for values in zip(*rows):
        first = values[0]
        if not isinstance(first, np.ndarray):
            return False
        shape, dtype = first.shape, first.dtype
        for value in values:
            if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != dtype:
                return False
        if shape:  # several times faster than np.stack for small arrays
            columns.append(np.concatenate(values).reshape((len(rows), *shape)))
        else:
            columns.append(np.array(values, dtype))
    parts.append(columns)
    rows.clear()
    return True
