"""Rows of one form held as columns, so that many small rows cost what a few arrays cost.

A request's rows travel as one sequence: a `Table` if all are arrays of one form, else a list. A table's row is made
when it is accessed; a part of a table is a slice of its columns, and tables are joined by one concatenation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from inflight.contract.values import Array, Row, T, Value


class Table(Sequence["list[Array]"]):
    """A sequence of n rows, held as columns: column [n, ...] has one input or output of all of them.

    A row is a list of views, one for each column; a slice is a table that views the columns.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Sequence[Array]) -> None:
        """`columns`: at least one, all with the same first dimension n >= 1."""
        self.columns = columns

    def reaches(self, size: int) -> bool:
        """Whether a value of a row has at least `size` bytes."""
        size *= len(self.columns[0])
        for column in self.columns:  # noqa: SIM110 - runs for every request, and a generator costs
            if column.nbytes >= size:
                return True
        return False

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, at: int) -> list[Array]: ...
    @overload
    def __getitem__(self, at: slice) -> Table: ...
    def __getitem__(self, at: int | slice) -> list[Array] | Table:
        if isinstance(at, slice):
            return Table([column[at] for column in self.columns])
        # The ellipsis keeps a single number an array.
        return [column[at, ...] for column in self.columns]

    def __iter__(self) -> Iterator[list[Array]]:
        for index in range(len(self)):
            yield [column[index, ...] for column in self.columns]


def join(parts: Sequence[Sequence[Row]]) -> Table | None:
    """The rows of several sequences, in order, as one table. A single table or a single row is not copied; otherwise
    values are copied once.

    Returns:
        None if the rows are not all arrays, or differ in their number of columns, dtypes or shapes.
    """
    if len(parts) == 1 and type(parts[0]) is Table:
        return parts[0]
    tables: list[Sequence[Array]] = []
    loose: list[Sequence[Value]] = []
    for part in parts:
        if type(part) is Table:
            if loose and not _stack(loose, tables):
                return None
            tables.append(part.columns)
        else:
            loose.extend(part)
    if loose and not _stack(loose, tables):
        return None
    if not tables:
        return None
    if len(tables) == 1:
        return Table(tables[0])
    try:
        return Table([np.concatenate(parts, dtype=parts[0].dtype, casting="no") for parts in zip(*tables, strict=True)])
    except (ValueError, TypeError):  # another number of columns, another shape, another dtype
        return None


def chain(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The rows, or outcomes, of several sequences, in order; a table if all can be joined to one."""
    if len(parts) == 1:
        return parts[0]
    if all(type(part) is Table for part in parts):
        table = join(parts)  # type: ignore[arg-type]
        if table is not None:
            return table  # type: ignore[return-value]
    return [row for part in parts for row in part]


def _stack(rows: list[Sequence[Value]], tables: list[Sequence[Array]]) -> bool:
    """Adds the columns of rows that are lists to `tables` and empties `rows`; False if they differ in form."""
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
        if len(rows) == 1:  # a view: it may be large
            columns.append(first[np.newaxis])
        elif shape:  # several times faster than np.stack for small arrays
            columns.append(np.concatenate(values).reshape((len(rows), *shape)))
        else:
            columns.append(np.array(values, dtype))
    tables.append(columns)
    rows.clear()
    return True
