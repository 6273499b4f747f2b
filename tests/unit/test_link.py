"""The channel's codec and the shared memory behind it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inflight.contract import CODES, Table, Texts, Value
from inflight.errors import InvalidRequest
from inflight.link import (
    BOARD_BYTES,
    LARGE,
    AnyMessage,
    Arena,
    ArenaReader,
    Board,
    BoardReader,
    Done,
    Drop,
    Failed,
    Leaving,
    Packer,
    Phase,
    ServerChannel,
    Stop,
    Trial,
    Unpacker,
    Work,
    WorkerChannel,
    create_file,
    parts,
    row_bytes,
)
from inflight.link.codec import PREFIX, decode

dtypes = st.sampled_from(list(CODES))
arrays = dtypes.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_side=5)))
shapes = npst.array_shapes(max_dims=3, max_side=3)


def several(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[Texts]:
    """Texts, or byte strings, in any shape."""
    return shapes.flatmap(
        lambda shape: st.lists(kind, min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda items: Texts(shape, items)
        )
    )


values = st.one_of(arrays, st.text(), st.binary(), several(st.text(max_size=9)), several(st.binary(max_size=9)))


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


# The two ends, the board


messages: st.SearchStrategy[AnyMessage] = st.one_of(
    st.builds(Drop, st.lists(st.integers(0, 1 << 40), max_size=5)),
    st.builds(Phase, st.text(max_size=2000)),
    st.builds(Trial, st.booleans()),
    st.builds(Failed, st.text(max_size=50)),
    st.just(Leaving()),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(messages, st.lists(st.lists(values, max_size=2), max_size=2)), max_size=6), st.data())
def test_the_servers_end_gives_the_same_messages_however_the_bytes_are_cut(
    sent: list[tuple[AnyMessage, list[list[Value]]]], data: st.DataObject
) -> None:
    stream = b""
    wanted: list[object] = []
    for message, rows in sent:
        packer = Packer()
        stream += Packer().frame(message) + packer.frame(Done([1], packer.rows([rows]), [], []))
        wanted += [message, rows]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    got: list[object] = []

    def take(message: AnyMessage, unpacker: Unpacker) -> None:
        got.append(list(unpacker.rows(message.rows)) if isinstance(message, Done) else message)

    channel = ServerChannel(take, lambda: None, None)
    for start, end in zip([0, *cuts], [*cuts, len(stream)]):
        channel.data_received(stream[start:end])
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        if isinstance(one, list) and isinstance(other, list):
            assert all(
                equal(a, b) for row, want in zip(one, other, strict=True) for a, b in zip(row, want, strict=True)
            )
        else:
            assert one == other


def test_both_ends_over_a_socket() -> None:
    """What either end sends arrives at the other, and the server is told once that the worker is gone."""
    told: list[object] = []

    async def talk() -> None:
        ours, theirs = socket.socketpair()
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = await ServerChannel.open(ours, lambda message, _: told.append(message), closed.set, None)
        worker = WorkerChannel(theirs)
        assert not worker.ready()
        server.send(Drop([4]))
        assert await loop.run_in_executor(None, worker.ready, 20)
        received = worker.receive()
        assert received is not None
        assert received[0] == Drop([4])
        assert worker.send(Phase("loads"))
        assert worker.send(Leaving())
        worker.close()
        await asyncio.wait_for(closed.wait(), 20)
        assert server.closed
        server.send(Stop())  # goes nowhere
        server.close()

    asyncio.run(talk())
    assert told == [Phase("loads"), Leaving()]


def test_a_frame_of_absurd_length_ends_the_connection() -> None:
    """Instead of collecting bytes for it."""

    async def send() -> bool:
        ours, theirs = socket.socketpair()
        closed = asyncio.Event()
        await ServerChannel.open(ours, lambda *message: None, closed.set, None)
        theirs.sendall(PREFIX.pack((1 << 32) - 1, 4))
        await asyncio.wait_for(closed.wait(), 20)
        theirs.settimeout(20)
        gone = theirs.recv(1) == b""
        theirs.close()
        return gone

    assert asyncio.run(send())


def test_a_worker_that_stops_reading_sees_the_end_at_once() -> None:
    ours, theirs = socket.socketpair()
    channel = WorkerChannel(theirs)
    channel.stop_reading()
    assert channel.ready()
    assert channel.receive() is None
    assert channel.send(Leaving())  # it may still say so
    ours.close()
    channel.close()


def test_values_stay_in_an_arena_that_already_holds_them() -> None:
    file = create_file("test", 1 << 24)
    arena = Arena(file)
    placed = arena.place(np.arange(LARGE, dtype=np.int64))
    assert placed is not None
    used = arena.in_use
    elsewhere = np.arange(LARGE, dtype=np.int64)
    packer = Packer(arena, allocate=False)
    frame = packer.frame(Done([1], packer.rows([[[placed], [elsewhere]]]), [], []))
    assert arena.in_use == used
    assert elsewhere.nbytes < len(frame) < 2 * elsewhere.nbytes
    message, unpacker = decode(frame[PREFIX.size :], PREFIX.unpack_from(frame)[1], 0, ArenaReader(file))
    assert isinstance(message, Done)
    assert all(equal(value, elsewhere) for (value,) in unpacker.rows(message.rows))
    del placed, unpacker
    arena.close()


@given(st.lists(st.integers(-(1 << 62), 1 << 62), max_size=50), st.data())
def test_the_board_shows_what_runs(keys: list[int], data: st.DataObject) -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    board, reader = Board(memory), BoardReader(memory.toreadonly())
    first, second = board.runner(), board.runner()
    assert reader.runs() == []
    first.begin(keys)
    second.begin([5])
    assert [run.keys for run in reader.runs()] == [keys, [5]]
    second.wait()
    assert [run.waiting for run in reader.runs()] == [False, True]
    second.resume()
    start = data.draw(st.integers(0, len(keys)))
    end = data.draw(st.integers(start, len(keys)))
    first.at(start, end)
    assert [(run.keys, run.waiting) for run in reader.runs()] == [(keys[start:end], False), ([5], False)]
    second.end()
    first.end()
    assert reader.runs() == []
    reader.close()


def test_runners_and_keys_beyond_the_boards_room_are_left_out() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    board, reader = Board(memory), BoardReader(memory.toreadonly())
    runners = [board.runner() for _ in range(150)]
    for runner in runners:
        runner.begin(range(10_000))
    runs = reader.runs()
    assert 0 < len(runs) < 150
    for run in runs:
        assert run.keys == list(range(len(run.keys)))
    reader.close()


@given(st.lists(st.lists(values, max_size=3), max_size=9), st.integers(1, 200))
def test_rows_are_divided_between_frames_by_their_size(rows: list[list[Value]], most: int) -> None:
    """In order, none left out, and as many to a frame as fit."""
    found = list(parts(rows, most))
    assert [at for first, last, _ in found for at in range(first, last)] == list(range(len(rows)))
    sizes = [row_bytes(row) for row in rows]
    assert [size for *_, size in found] == [sum(sizes[first:last]) for first, last, _ in found]
    assert all(size <= most or last == first + 1 for first, last, size in found)
    assert all(here[2] + sizes[there[0]] > most for here, there in itertools.pairwise(found))


@given(st.integers(1, 50), st.integers(0, 9), st.integers(1, 200))
def test_columns_are_divided_as_their_rows(count: int, width: int, most: int) -> None:
    columns = [np.zeros((count, width), np.float32), np.ones(count, np.int8)]
    table = Table(columns)
    assert list(parts(table, most)) == list(parts(list(table), most))
