"""The channel's codec and the shared memory behind it."""

from __future__ import annotations

import gc
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inflight.contract import CODES, Value
from inflight.errors import InvalidRequest
from inflight.link import LARGE, Arena, ArenaReader, Done, Packer, Stop, Work, WorkerChannel, create_file
from inflight.link.codec import PREFIX, decode

dtypes = st.sampled_from(list(CODES))
arrays = dtypes.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_side=5)))
values = st.one_of(arrays, st.text(), st.binary())


def equal(a: Value, b: Value) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def roundtrip(
    rows: list[list[Value]], arena: Arena | None = None, reader: ArenaReader | None = None
) -> list[list[Value]]:
    packer = Packer(arena)
    frame = packer.frame(Work(0, 0, packer.rows([rows]), None, []))
    length, header = PREFIX.unpack_from(frame)
    assert length == len(frame) - PREFIX.size
    message, unpacker = decode(bytearray(frame[PREFIX.size :]), header, 0, reader)
    assert isinstance(message, Work)
    return list(unpacker.rows(message.rows))


@given(st.lists(st.lists(values, max_size=4), max_size=5))
def test_any_rows_arrive_as_they_were_sent(rows: list[list[Value]]) -> None:
    back = roundtrip(rows)
    assert len(back) == len(rows)
    for row, other in zip(rows, back):
        assert len(row) == len(other)
        assert all(equal(a, b) for a, b in zip(row, other))


def test_arrays_of_a_bytearray_are_writable_and_aligned() -> None:
    (row,) = roundtrip([[np.ones(3, np.int8), np.ones((2, 2), np.float64)]])
    for array in row:
        assert isinstance(array, np.ndarray)
        assert array.flags.writeable
        assert array.flags.aligned


def test_unknown_dtypes_are_refused_with_the_ones_that_work() -> None:
    with pytest.raises(InvalidRequest, match="complex128 cannot be sent; use one of"):
        Packer().row([np.ones(2, np.complex128)])


def test_large_values_go_through_the_arena_and_free_it() -> None:
    file = create_file("test", 1 << 24)
    arena = Arena(file)
    released: list[int] = []
    reader = ArenaReader(file, released.append)
    array = np.arange(LARGE, dtype=np.float32)
    blob = bytes(range(256)) * (LARGE // 256)
    (row,) = roundtrip([[array, blob]], arena, reader)
    assert equal(row[0], array)
    assert equal(row[1], blob)
    assert isinstance(row[0], np.ndarray)
    assert not row[0].flags.writeable
    assert arena.in_use > 0
    view = row[0][10:20]
    del row
    gc.collect()
    assert len(released) == 1  # the bytes were copied out; a view keeps the array's block
    del view
    gc.collect()
    for offset in released:
        arena.free(offset)
    assert arena.in_use == 0
    arena.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200_000)), max_size=60))
def test_blocks_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int]]) -> None:
    size = 1 << 20
    arena = Arena(create_file("test", size))
    held: dict[int, int] = {}
    for grow, number in steps:
        if grow or not held:
            offset = arena.take(number)
            if offset is None:
                continue
            for start, length in held.items():
                assert offset + number <= start or start + length <= offset
            assert offset + number <= size
            held[offset] = number
        else:
            offset = list(held)[number % len(held)]
            del held[offset]
            arena.free(offset)
    for offset in held:
        arena.free(offset)
    assert arena.in_use == 0
    assert arena.take(size) == 0
    arena.close()


def test_a_block_lives_as_long_as_anything_over_it() -> None:
    arena = Arena(create_file("test", 1 << 20))
    placed = arena.place(np.arange(30_000, dtype=np.int32))
    assert placed is not None
    part = placed.reshape(2, -1)[1]
    del placed
    gc.collect()
    assert arena.in_use > 0
    assert part[0] == 15_000
    del part
    gc.collect()
    assert arena.in_use == 0
    arena.close()


def test_the_workers_end_reads_frames_and_notices_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = WorkerChannel(theirs)
    packer = Packer()
    ours.sendall(packer.frame(Done([7], packer.rows([[["x"]]]), [], [])) + Packer().frame(Stop()))
    first = channel.receive()
    assert first is not None
    message, unpacker = first
    assert isinstance(message, Done)
    assert unpacker.rows(message.rows) == [["x"]]
    second = channel.receive()
    assert second is not None
    assert isinstance(second[0], Stop)
    ours.close()
    assert channel.receive() is None
    assert channel.send(Stop()) is False
    channel.close()
