"""Rows as columns: whatever way rows came together, their columns hold the same values."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.extra.numpy as npst
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inflight.contract import Array, Row, Table, as_columns
from inflight.router.group import _share

shapes = st.lists(npst.array_shapes(min_dims=0, max_dims=3, max_side=3), min_size=1, max_size=3)
dtypes = st.sampled_from(["float32", "int64", "bool"])


@st.composite
def mixed_rows(draw: st.DrawFn) -> list[Row]:
    """Rows of one form, some from tables (whole, in pieces, out of order), some as lists."""
    forms = [(shape, draw(dtypes)) for shape in draw(shapes)]
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        columns = [draw(npst.arrays(dtype, (count, *shape))) for shape, dtype in forms]
        made = Table(columns).rows()
        chosen = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4)) if draw(st.booleans()) else made
        rows += [list(row) for row in chosen] if draw(st.booleans()) else chosen
    return rows


@given(mixed_rows())
def test_columns_hold_the_rows_in_order(rows: list[Row]) -> None:
    columns = as_columns(rows)
    assert columns is not None
    assert len(columns) == len(rows[0])
    for index, row in enumerate(rows):
        for column, value in zip(columns, row):
            assert isinstance(value, np.ndarray)
            assert column.dtype == value.dtype
            assert column[index].tobytes() == value.tobytes()
            assert column.shape == (len(rows), *value.shape)


def test_neighbours_in_a_table_are_not_copied() -> None:
    table = Table([np.arange(12).reshape(6, 2), np.arange(6)])
    columns = as_columns(table.rows()[2:5])
    assert columns is not None
    assert [column.tolist() for column in columns] == [[[4, 5], [6, 7], [8, 9]], [2, 3, 4]]
    assert all(np.shares_memory(column, whole) for column, whole in zip(columns, table.columns))


def test_rows_of_several_forms_have_no_columns() -> None:
    one: Array = np.ones(2, np.float32)
    others: list[Sequence[object]] = [[np.ones(3, np.float32)], [np.ones(2)], [one, one], ["text"], [b"bytes"], []]
    for other in others:
        assert as_columns([[one], other]) is None  # type: ignore[list-item]
        assert as_columns([other, Table([one[None]]).rows()[0]]) is None  # type: ignore[list-item]


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 5))
def test_a_burst_is_cut_into_as_few_messages_as_full_batches_would_be(waiting: int, batch: int, replicas: int) -> None:
    sizes = []
    left = waiting
    while left:
        size = _share(left, batch, replicas)
        assert 1 <= size <= batch
        sizes.append(size)
        left -= min(size, left)
    assert len(sizes) == -(-waiting // batch)
