"""What travels between the server and a worker: typed messages, values, and how both become bytes.

A frame is `u32 length, u32 header length, header, padding to 16, blob`. The header is MessagePack; the blob holds
the raw bytes of small arrays, each aligned to 16, so that the receiver makes arrays as views of the one buffer it
read and the C library that parses the header never copies array data. Large arrays and bytes lie in an arena and
only their offset travels (`inflight.link.arena`).

A value on the wire is a str or a `WireArray`.
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
    STRINGS_CODE,
    Array,
    Row,
    StepPlan,
    StepResult,
    Table,
    Texts,
    Transfer,
    Transferred,
    Value,
    join,
)
from inflight.errors import InvalidRequest
from inflight.link.arena import LARGE, Arena, ArenaReader
from inflight.link.offer import Offer, WorkerJob
from inflight.link.step import AdapterReady, DropAdapter, LoadAdapter, LoadShard, Progress, ShardReady
from inflight.link.values import WireArray, WireRows, WireValue
from inflight.link.vision import EncodeImage, ImageEncoded, ImageFailed, LoadVision, VisionReady

PREFIX = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
ALIGN = 16
MAX_FRAME = 1 << 31


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """The error of instance `key`: its kind (`inflight.errors.error_from_wire`) and text."""

    key: int
    kind: str
    text: str


class StageRuns(msgspec.Struct, array_like=True, frozen=True):
    """Runs of one stage of a method: how many instances each had, how long each took, how many there were."""

    method: str
    stage: str
    size: int
    seconds: float
    count: int


class CallItem(msgspec.Struct, array_like=True, frozen=True):
    """One row for a model elsewhere; `key` is that of the instance whose stage it is, 0 for a call of user code."""

    number: int
    row: list[str | WireArray]
    key: int


class CallOutcome(msgspec.Struct, array_like=True, frozen=True):
    """The outcome of a `CallItem`: a row, or the error's kind and text."""

    number: int
    row: list[str | WireArray] | None
    kind: str = ""
    text: str = ""


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
        frees: blocks of the worker's outbox that the server does not read any more.
    """

    method: int
    first: int
    rows: WireRows
    seconds: list[float | None] | None
    frees: list[int]


class Done(Message, tag=4, frozen=True):
    """Worker to server: outcomes, and what was measured.

    Attributes:
        ids: instances that went well; `rows`: their outputs (`Packer.rows`).
        errors: of the others.
    """

    ids: list[int]
    rows: WireRows
    errors: list[WireError]
    stats: list[StageRuns]


class Drop(Message, tag=5, frozen=True):
    """Server to worker: the callers of these instances wait no more."""

    ids: list[int]


class Call(Message, tag=6, frozen=True):
    """Worker to server: model rows to run elsewhere."""

    model: str
    subgraph: int
    items: list[CallItem]


class CallDone(Message, tag=7, frozen=True):
    """Server to extra worker: their outcomes."""

    items: list[CallOutcome]


class Stop(Message, tag=8, frozen=True):
    """Server to worker: end now, without finishing what runs."""


class Leaving(Message, tag=9, frozen=True):
    """Worker to server: a signal asked it to end; it takes no more work."""


class Phase(Message, tag=21, frozen=True):
    """Worker to server, while it loads: the current step, for people who wait."""

    text: str


class Trial(Message, tag=20, frozen=True):
    """Worker to server, while it loads: a model's graph is run on made-up inputs, which may never end.

    Attributes:
        running: it begins; else it has ended.
    """

    running: bool


class Running(Message, tag=27, frozen=True):
    """Worker on another machine to server, while it has work: what runs there, in place of a board in shared memory.

    Attributes:
        runs: of each: seconds since its begin, whether it waits, its keys (as `inflight.link.board.Run`).
    """

    runs: list[tuple[float, bool, list[int]]]


class Admit(Message, tag=28, frozen=True):
    """Server to the worker of a distributed servable, and back when it is done: agents may come to its address, or it
    leaves the address to another group.

    Attributes:
        text: in the answer: why it cannot be done.
    """

    agents: bool
    text: str = ""


AnyMessage: TypeAlias = (
    "Load | Ready | Failed | Work | Done | Drop | Call | CallDone | Stop | Leaving | Running | Admit | "
    "StepPlan | StepResult | Transfer | Transferred | LoadShard | ShardReady | Progress | Trial | Phase | "
    "LoadVision | VisionReady | EncodeImage | ImageEncoded | ImageFailed | LoadAdapter | AdapterReady | DropAdapter"
)


def _from_wire(kind: type, value: Any) -> Any:
    """Types that MessagePack does not have travel as their text."""
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
    | Running
    | Admit
    | StepPlan
    | StepResult
    | Transfer
    | Transferred
    | LoadShard
    | ShardReady
    | Progress
    | Trial
    | Phase
    | LoadVision
    | VisionReady
    | EncodeImage
    | ImageEncoded
    | ImageFailed
    | LoadAdapter
    | AdapterReady
    | DropAdapter,
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
        allocate: copy large values into the arena. Otherwise only values that already lie there travel as offsets,
            and the caller keeps the blocks alive.
    """

    def __init__(self, arena: Arena | None = None, allocate: bool = True) -> None:
        self._arena = arena
        self._allocate = allocate
        self._parts: list[bytes] = []
        self._size = 0

    def rows(self, parts: Sequence[Sequence[Row]]) -> WireRows:
        """The rows of several sequences, in order: small ones of one form become columns.

        Raises:
            InvalidRequest: as `value`.
        """
        table = join(parts) if _are_small(parts) else None
        if table is not None:
            return WireRows([self.array(column) for column in table.columns], [])
        return WireRows(None, [self.row(row) for rows in parts for row in rows])

    def row(self, values: Sequence[object]) -> list[WireValue]:
        return [self.value(value) for value in values]

    def value(self, value: object) -> WireValue:
        """A value (or `Blob`) in its wire form.

        Raises:
            InvalidRequest: it is of another type, or an array of a dtype that no protocol carries.
        """
        if isinstance(value, np.ndarray):
            return self.array(value)
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            large = len(value) >= LARGE
            where = self._large(np.frombuffer(value, np.uint8)) if large else self._small(value)
            return WireArray(BYTES_CODE, (len(value),), where)
        if isinstance(value, Texts):
            return self._texts(value)
        if isinstance(value, Blob):
            return WireArray(BYTES_CODE, value.array.shape, self._large(value.array))
        raise InvalidRequest(f"a {type(value).__name__} cannot be sent; use an array, a str or bytes")

    def _texts(self, texts: Texts) -> WireArray:
        """Each behind its length, as 4 bytes; before the dimensions the bytes of all."""
        code, raw = STRINGS_CODE + 1, bytearray()
        for item in texts.items:
            if isinstance(item, str):
                code, item = STRINGS_CODE, item.encode()
            raw += _LENGTH.pack(len(item)) + item
        where = self._large(np.frombuffer(raw, np.uint8)) if len(raw) >= LARGE else self._small(bytes(raw))
        return WireArray(code, (len(raw), *texts.shape), where)

    def array(self, array: Array) -> WireArray:
        code = CODES.get(array.dtype)
        if code is None:
            raise InvalidRequest(f"data type {array.dtype} cannot be sent; use one of bool, int8 to float64")
        if array.nbytes >= LARGE:
            return WireArray(code, array.shape, self._large(np.ascontiguousarray(array)))
        return WireArray(code, array.shape, self._small(array.tobytes()))

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

    def rows(self, wire: WireRows) -> Sequence[Row]:
        """What `Packer.rows` packed."""
        if wire.columns is not None:
            return Table([self._data(DTYPES[item.code], item.shape, item.where) for item in wire.columns])
        return [self.row(row) for row in wire.rows]

    def row(self, wire: Sequence[WireValue]) -> list[Value]:
        return [item if isinstance(item, str) else self._array(item) for item in wire]

    def _array(self, item: WireArray) -> Value:
        if item.code == BYTES_CODE:
            return self._data(np.dtype(np.uint8), item.shape, item.where).tobytes()
        if item.code >= STRINGS_CODE:
            return self._texts(item)
        return self._data(DTYPES[item.code], item.shape, item.where)

    def _texts(self, item: WireArray) -> Texts:
        raw = self._data(np.dtype(np.uint8), item.shape[:1], item.where).tobytes()
        found: list[bytes] = []
        at = 0
        while at < len(raw):
            start = at + _LENGTH.size
            at = start + _LENGTH.unpack_from(raw, at)[0]
            found.append(raw[start:at])
        strings = item.code == STRINGS_CODE
        return Texts(item.shape[1:], [each.decode() for each in found] if strings else found)

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


def _are_small(parts: Sequence[Sequence[Row]]) -> bool:
    """Whether the values of each part's first row are small arrays; `join` compares the others with it."""
    for rows in parts:
        if type(rows) is Table:
            if rows.reaches(LARGE):
                return False
            continue
        for value in rows[0] if rows else ():
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
