"""What travels between a distributed servable's worker and its agents: frames over TCP.

A frame is `u32 header length, u64 blob length, header, blob`. The header is MessagePack; the blob holds the arrays
that the header describes, each aligned to 16, so that the receiver's arrays are views of the one buffer it read.
Nothing in a frame is executed or trusted: sizes, types and shapes are checked before an array is made.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np

from inflight.contract import CODES, DTYPES, Array, TensorSpec
from inflight.errors import StartError
from inflight.version import __version__

PREFIX = struct.Struct("<IQ")
ALIGN = 16

PROTOCOL = 1
"""Version of these messages, raised by a change that the other side has to know. `Acquire`, `GroupConfig`, `Register`
and `Refused` keep their tags and fields in all versions, so that two of them can tell each other what they are."""

MAX_HEADER = 8 << 20
MAX_BLOB = 512 << 20
"""Bytes of the arrays of one message: MindSpore Serving's limit."""


class ProtocolError(StartError):
    """The other side does not speak this protocol, or not this version of it."""


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of all messages; the tag tells them apart."""


class Acquire(Message, tag=0, frozen=True):
    """Launcher to worker: what are the ranks?

    Attributes:
        protocol, release: `PROTOCOL` and Inflight's version there, as in the messages below; who says none has 1.
    """

    protocol: int = 1
    release: str = ""


class RankPlace(msgspec.Struct, array_like=True, frozen=True):
    """Where one rank runs."""

    ip: str
    device_id: int


class GroupConfig(Message, tag=1, frozen=True):
    """Worker to launcher: the answer.

    Attributes:
        servable: its name.
        rank_table: the text of the rank table's file, as it is.
        ranks: by rank.
    """

    servable: str
    rank_table: str
    ranks: list[RankPlace]
    protocol: int = 1
    release: str = ""


class AgentsFailed(Message, tag=2, frozen=True):
    """Launcher to worker: agents could not be started."""

    text: str


class Meet(Message, tag=3, frozen=True):
    """Agent to worker: where do the ranks meet that exchange tensors?

    Attributes:
        address: of rank 0: `host:port` where it listens; else empty.
    """

    address: str


class Met(Message, tag=4, frozen=True):
    """Worker to agent: there."""

    address: str


class WireGraph(msgspec.Struct, array_like=True, frozen=True):
    """One sub-graph of a rank: name, type and shape of each tensor, batch dimension included."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Register(Message, tag=5, frozen=True):
    """Agent to worker: its sub-graphs are loaded and were run once.

    Attributes:
        address: names the agent in logs.
        device_type: on which the rank runs.
        pid: its process, on its machine.
    """

    rank: int
    address: str
    device_type: str
    graphs: list[WireGraph]
    protocol: int = 1
    release: str = ""
    pid: int = 0


class Registered(Message, tag=6, frozen=True):
    """Worker to agent: welcome."""


class Refused(Message, tag=7, frozen=True):
    """Worker to whoever asked: no, and why.

    Attributes:
        final: it will not be otherwise later.
    """

    text: str
    final: bool = False


class WireTensor(msgspec.Struct, array_like=True, frozen=True):
    """One array of the blob: its dtype by number (`inflight.contract.CODES`) and its shape."""

    code: int
    shape: tuple[int, ...]


class Predict(Message, tag=8, frozen=True):
    """Worker to agent: run a sub-graph. Messages are run in the order in which they come.

    Attributes:
        number: of the batch, counting up.
        return_result: the outputs are wanted; of all ranks but the last they are not.
        inputs: none for a rank of a later stage without inputs.
    """

    number: int
    subgraph: int
    return_result: bool
    inputs: list[WireTensor]


class Predicted(Message, tag=9, frozen=True):
    """Agent to worker: the outcome of a `Predict`; `error` is empty where it went well."""

    number: int
    outputs: list[WireTensor]
    error: str = ""


class Ping(Message, tag=10, frozen=True):
    """Worker to agent, once a second."""


class Pong(Message, tag=11, frozen=True):
    """Agent to worker: still here."""


class Exit(Message, tag=12, frozen=True):
    """Worker to agent: end now. Agent to worker: it ends because it was asked to."""


class RankEnded(Message, tag=13, frozen=True):
    """Launcher to worker: how an agent's process ended, so that the right one is blamed.

    Attributes:
        status: its exit status, or the number of the signal with a minus sign.
        pid: as it registered.
    """

    rank: int
    status: int
    pid: int = 0


AnyMessage: TypeAlias = (
    Acquire
    | GroupConfig
    | AgentsFailed
    | Meet
    | Met
    | Register
    | Registered
    | Refused
    | Predict
    | Predicted
    | Ping
    | Pong
    | Exit
    | RankEnded
)


def mismatch(theirs: Acquire | GroupConfig | Register, here: str, there: str) -> str:
    """What is wrong where the other side has another protocol; empty: it has this one. Args: here, there: the sides."""
    if theirs.protocol == PROTOCOL:
        return ""
    release = theirs.release or "that does not say its version"
    return (
        f"{there} speaks version {theirs.protocol} of the protocol for agents (Inflight {release}), {here} speaks "
        f"version {PROTOCOL} (Inflight {__version__}): install one version of Inflight on both sides"
    )


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def describe(arrays: Sequence[Array]) -> list[WireTensor]:
    """The descriptions of arrays that are sent with a message.

    Raises:
        ValueError: a data type that no protocol carries, or more than a message holds.
    """
    if sum(array.nbytes + -array.nbytes % ALIGN for array in arrays) > MAX_BLOB:
        raise ValueError(f"the arrays of one batch take more than {MAX_BLOB >> 20} MiB; use a smaller max_batch_size")
    for array in arrays:
        if array.dtype not in CODES:
            raise ValueError(f"data type {array.dtype} cannot be sent; use one of bool, int8 to float64")
    return [WireTensor(CODES[array.dtype], array.shape) for array in arrays]


def encode(message: AnyMessage, arrays: Sequence[Array] = ()) -> list[Any]:
    """The buffers of one frame, to be sent one after the other; arrays are not copied where they are contiguous."""
    header = _encoder.encode(message)
    parts: list[Any] = []
    size = 0
    for array in arrays:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padding = -raw.nbytes % ALIGN
        parts += [raw.data, bytes(padding)] if padding else [raw.data]
        size += raw.nbytes + padding
    return [PREFIX.pack(len(header), size) + header, *parts]


def decode(header: bytes | bytearray) -> AnyMessage:
    """Raises ProtocolError for what is no message."""
    try:
        return _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from None


def arrays_of(tensors: Sequence[WireTensor], blob: bytearray) -> list[Array]:
    """The arrays of a frame, as views of its blob.

    Raises:
        ProtocolError: the descriptions do not fit the blob.
    """
    arrays: list[Array] = []
    at = 0
    for tensor in tensors:
        dtype = DTYPES.get(tensor.code)
        if dtype is None or any(size < 0 for size in tensor.shape) or len(tensor.shape) > 64:
            raise ProtocolError(f"a tensor of type {tensor.code} and shape {list(tensor.shape)[:64]}")
        size = math.prod(tensor.shape) * dtype.itemsize
        if at + size > len(blob):
            raise ProtocolError("a tensor is longer than its message")
        arrays.append(np.ndarray(tensor.shape, dtype, blob, at))
        at += size + (-size % ALIGN)
    if at != len(blob):
        raise ProtocolError("a message is longer than its tensors")
    return arrays
