"""What travels between the server and a worker: typed messages, values, and how both become bytes.

A frame is `u32 length, u32 header length, header, padding to 16, blob`. The header is MessagePack; the blob holds
the raw bytes of small arrays, each aligned to 16, so that the receiver makes arrays as views of the one buffer it
read and the C library that parses the header never copies array data. Large arrays and bytes lie in an arena and
only their offset travels (`inflight.link.arena`).

A value on the wire is a str, a bytes, or `[dtype code, shape, where]`: `where >= 0` is an offset in the blob,
`where < 0` the arena offset `-1 - where`. Code 14 stands for large bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np

from inflight.contract import (
    BYTES_CODE,
    CODES,
    DTYPES,
    Array,
    Row,
    StepPlan,
    StepResult,
    Table,
    TableRow,
    Value,
    as_columns,
)
from inflight.errors import InvalidRequest
from inflight.link.arena import LARGE, Arena, ArenaReader
from inflight.link.offer import Offer, WorkerJob
from inflight.link.step import LoadShard, Progress, ShardReady

PREFIX = struct.Struct("<II")
ALIGN = 16
MAX_FRAME = 1 << 31

WireValue: TypeAlias = "str | bytes | Sequence[Any]"


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of all messages; the tag tells them apart on the wire."""


class Load(Message, tag=0, frozen=True):
    """Server to worker, first of all: what to load."""

    job: WorkerJob


class Ready(Message, tag=1, frozen=True):
    """Worker to server: loaded and warmed up; what it offers."""

    offer: Offer


class Failed(Message, tag=2, frozen=True):
    """Worker to server: it cannot start, and why."""

    text: str


class Work(Message, tag=3, frozen=True):
    """Server to worker: instances of one method to run.

    Attributes:
        method: index of the method in the worker's offer.
        first: id of the first instance; the others count up from it.
        rows: their inputs (`Packer.rows`).
        seconds: time left for each, None for an instance without a deadline; None where none has one.
        frees: blocks of the worker's outbox that nobody reads any more.
    """

    method: int
    first: int
    rows: list[Any]
    seconds: list[float | None] | None
    frees: list[int]


class Done(Message, tag=4, frozen=True):
    """Worker to server: outcomes, and what was measured.

    Attributes:
        ids: instances that went well; `rows`: their outputs (`Packer.rows`).
        errors: the others, each `[id, error kind, error text]`.
        stats: each `[method, stage label, instances in one run, seconds of one run, number of such runs]`.
    """

    ids: list[int]
    rows: list[Any]
    errors: list[Any]
    stats: list[Any]


class Drop(Message, tag=5, frozen=True):
    """Server to worker: nobody waits for these instances any more."""

    ids: list[int]


class Call(Message, tag=6, frozen=True):
    """Worker to server: model rows to run elsewhere, each `[id, row, key]`; `key` is that of the instance, or 0."""

    model: str
    subgraph: int
    items: list[Any]


class CallDone(Message, tag=7, frozen=True):
    """Server to extra worker: their outcomes, each `[id, row or None, error kind, error text]`."""

    items: list[Any]


class Stop(Message, tag=8, frozen=True):
    """Server to worker: finish nothing more, leave."""


class Leaving(Message, tag=9, frozen=True):
    """Worker to server: it was asked by a signal to end and will not take more work."""


class Phase(Message, tag=21, frozen=True):
    """Worker to server, while it loads: what it does now, for people who wait."""

    text: str


class Trial(Message, tag=20, frozen=True):
    """Worker to server, while it loads: a model's graph is run on made-up inputs, which may never end.

    Attributes:
        running: it begins; else it has ended.
    """

    running: bool


AnyMessage: TypeAlias = (
    "Load | Ready | Failed | Work | Done | Drop | Call | CallDone | Stop | Leaving | "
    "StepPlan | StepResult | LoadShard | ShardReady | Progress | Trial | Phase"
)


def _from_wire(kind: type, value: Any) -> Any:
    """What MessagePack has no type for travels as its text."""
    return kind(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=str)
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(
    Load
    | Ready
    | Failed
    | Work
    | Done
    | Drop
    | Call
    | CallDone
    | Stop
    | Leaving
    | StepPlan
    | StepResult
    | LoadShard
    | ShardReady
    | Progress
    | Trial
    | Phase,
    dec_hook=_from_wire,
)


class Blob:
    """Bytes that already lie in an arena."""

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = array


class Packer:
    """Collects the blob of one frame while values are turned into their wire form.

    Args:
        arena: where large values lie; None sends everything through the socket.
        allocate: copy large values into the arena; else only those that already lie there stay there, because
            somebody else minds the lives of the blocks.
    """

    def __init__(self, arena: Arena | None = None, allocate: bool = True) -> None:
        self._arena = arena
        self._allocate = allocate
        self._parts: list[bytes] = []
        self._size = 0

    def rows(self, rows: Sequence[Sequence[object]]) -> list[Any]:
        """Rows in their wire form: `[True, columns]` where small rows of one form travel as arrays [n, ...], else
        `[False, rows]`.

        Raises:
            InvalidRequest: as `value`.
        """
        if _small_rows(rows):
            columns = as_columns(rows)  # type: ignore[arg-type]  # anything that is no array makes it None
            if columns is not None:
                return [True, [self._array(column) for column in columns]]
        return [False, [self.row(row) for row in rows]]

    def row(self, values: Sequence[object]) -> list[WireValue]:
        return [self.value(value) for value in values]

    def value(self, value: object) -> WireValue:
        """A value (or `Blob`) in its wire form.

        Raises:
            InvalidRequest: it is of another type, or an array of a dtype that no protocol carries.
        """
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, bytes) and len(value) >= LARGE:
            raw: Array = np.frombuffer(value, np.uint8)
            return (BYTES_CODE, raw.shape, self._large(raw))
        if isinstance(value, (str, bytes)):
            return value
        if isinstance(value, Blob):
            return (BYTES_CODE, value.array.shape, self._large(value.array))
        raise InvalidRequest(f"a {type(value).__name__} cannot be sent; use an array, a str or bytes")

    def _array(self, array: Array) -> WireValue:
        code = CODES.get(array.dtype)
        if code is None:
            raise InvalidRequest(f"data type {array.dtype} cannot be sent; use one of bool, int8 to float64")
        if array.nbytes >= LARGE:
            return (code, array.shape, self._large(np.ascontiguousarray(array)))
        return (code, array.shape, self._small(array.tobytes()))

    def _small(self, data: bytes) -> int:
        where = self._size
        self._parts.append(data)
        extra = -len(data) % ALIGN
        if extra:
            self._parts.append(bytes(extra))
        self._size = where + len(data) + extra
        return where

    def _large(self, array: Array) -> int:
        if self._arena is not None:
            offset = self._arena.offset_of(array)
            if offset is None and self._allocate:
                offset = self._arena.take(array.nbytes)
                if offset is not None:
                    self._arena.write(offset, array)
            if offset is not None:
                return -1 - offset
        return self._small(array.tobytes())

    def frame(self, message: AnyMessage) -> bytes:
        """The bytes of one frame: this message with the values packed so far."""
        header = _encoder.encode(message)
        padding = -(PREFIX.size + len(header)) % ALIGN
        length = len(header) + padding + self._size
        return b"".join((PREFIX.pack(length, len(header)), header, bytes(padding), *self._parts))


class Unpacker:
    """Turns wire values of one frame back into values that view the frame's buffer.

    Arrays are writable exactly when the buffer is; arrays in an arena never are.
    """

    __slots__ = ("_blob", "_buffer", "_reader")

    def __init__(self, buffer: bytes | bytearray, blob: int, reader: ArenaReader | None) -> None:
        self._buffer = buffer
        self._blob = blob
        self._reader = reader

    def rows(self, wire: Sequence[Any]) -> Sequence[Row]:
        """What `Packer.rows` packed."""
        columnar, content = wire
        if columnar:
            columns = [self._array(*item) for item in content]
            return Table(columns).rows()  # type: ignore[arg-type]  # columns are arrays
        return [self.row(row) for row in content]

    def row(self, wire: Sequence[Any]) -> list[Value]:
        return [item if isinstance(item, (str, bytes)) else self._array(*item) for item in wire]

    def _array(self, code: int, shape: Sequence[int], where: int) -> Value:
        if code == BYTES_CODE:
            data = self._data(np.dtype(np.uint8), shape, where)
            return data.tobytes()
        return self._data(DTYPES[code], shape, where)

    def _data(self, dtype: np.dtype[Any], shape: Sequence[int], where: int) -> Array:
        if where >= 0:
            array: Array = np.ndarray(shape, dtype, self._buffer, self._blob + where)
            return array
        assert self._reader is not None
        count = 1
        for dim in shape:
            count *= dim
        view = self._reader.view(-1 - where, count * dtype.itemsize)
        return np.frombuffer(view, dtype).reshape(shape)


def _small_rows(rows: Sequence[Sequence[object]]) -> bool:
    """Whether the first row's values are small arrays; the others are compared with it when they are stacked."""
    if not rows:
        return False
    first = rows[0]
    if type(first) is TableRow:
        return first.table.largest < LARGE
    for value in first:  # noqa: SIM110 - runs for every message, and a generator costs
        if not isinstance(value, np.ndarray) or value.nbytes >= LARGE:
            return False
    return True


def decode(
    buffer: bytes | bytearray, header_length: int, start: int = 0, reader: ArenaReader | None = None
) -> tuple[AnyMessage, Unpacker]:
    """A message and the reader of its values.

    Args:
        buffer: holds the frame after its prefix, from `start` on.
        header_length: the prefix's second number.
        reader: the arena that offsets refer to.
    """
    message = _decoder.decode(memoryview(buffer)[start : start + header_length])
    blob = start + header_length + (-(PREFIX.size + header_length) % ALIGN)
    return message, Unpacker(buffer, blob, reader)
