"""Rows as columns: whatever way rows came together, their columns hold the same values."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.extra.numpy as npst
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inflight.contract import Array, Row, Table, chain, join
from inflight.router.group import _share

shapes = st.lists(npst.array_shapes(min_dims=0, max_dims=3, max_side=3), min_size=1, max_size=3)
dtypes = st.sampled_from(["float32", "int64", "bool"])


@st.composite
def mixed_parts(draw: st.DrawFn) -> list[Sequence[Row]]:
    """Rows of one form in parts: tables, pieces of tables, lists."""
    forms = [(shape, draw(dtypes)) for shape in draw(shapes)]
    parts: list[Sequence[Row]] = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        table = Table([draw(npst.arrays(dtype, (count, *shape))) for shape, dtype in forms])
        piece = table[draw(st.integers(0, count - 1)) :] if draw(st.booleans()) else table
        parts.append(list(piece) if draw(st.booleans()) else piece)
    return parts


@given(mixed_parts())
def test_a_table_holds_the_rows_of_its_parts_in_order(parts: list[Sequence[Row]]) -> None:
    table = join(parts)
    rows = [row for part in parts for row in part]
    assert table is not None
    assert len(table) == len(rows)
    for index, row in enumerate(rows):
        for column, value, again in zip(table.columns, row, table[index], strict=True):
            assert isinstance(value, np.ndarray)
            assert column.dtype == value.dtype == again.dtype
            assert column[index].tobytes() == value.tobytes() == again.tobytes()
            assert column.shape[1:] == value.shape == again.shape


@given(mixed_parts())
def test_chained_parts_are_the_same_rows(parts: list[Sequence[Row]]) -> None:
    chained = chain(parts)
    assert [[value.tobytes() for value in row] for row in chained] == [  # type: ignore[union-attr]
        [value.tobytes() for value in row]  # type: ignore[union-attr]
        for part in parts
        for row in part
    ]
    if all(isinstance(part, Table) for part in parts):
        assert isinstance(chained, Table)


def test_a_piece_of_a_table_is_not_copied() -> None:
    table = Table([np.arange(12).reshape(6, 2), np.arange(6)])
    piece = join([table[2:5]])
    assert piece is not None
    assert [column.tolist() for column in piece.columns] == [[[4, 5], [6, 7], [8, 9]], [2, 3, 4]]
    assert all(np.shares_memory(column, whole) for column, whole in zip(piece.columns, table.columns))
    assert np.shares_memory(table[1][0], table.columns[0])
    alone = join([[table[1]]])
    assert alone is not None
    assert [column.tolist() for column in alone.columns] == [[[2, 3]], [1]]
    assert all(np.shares_memory(column, whole) for column, whole in zip(alone.columns, table.columns))


def test_rows_of_several_forms_have_no_columns() -> None:
    one: Array = np.ones(2, np.float32)
    others: list[Sequence[object]] = [[np.ones(3, np.float32)], [np.ones(2)], [one, one], ["text"], [b"bytes"], []]
    for other in others:
        assert join([[[one], other]]) is None  # type: ignore[list-item]
        assert join([[other], Table([one[None]])]) is None  # type: ignore[list-item]


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
