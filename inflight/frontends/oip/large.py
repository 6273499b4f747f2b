"""Requests and replies of gRPC whose tensors stay where they are: the arrays view the request's bytes, and the reply is
sent from the arrays' memory. protobuf would copy each tensor twice, either way.

In protobuf's encoding a message is a sequence of fields: a tag, which is the field's number and its wire type, and the
field's value, with its length before it if it is bytes or a message. (https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from inflight.frontends.oip.tensors import OipTensor, to_raw
from inflight.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from inflight.wire import Encoded, Reply

LARGE = 64 * 1024
"""Bytes of a tensor from which it is not copied."""
_RAW_INPUT = 7 << 3 | 2
_RAW_OUTPUT = 6 << 3 | 2
_INFER_RESPONSE = 2 << 3 | 2
"""Tags of `ModelInferRequest.raw_input_contents`, of `ModelInferResponse.raw_output_contents`, and of
`ModelStreamInferResponse.infer_response`."""
_FIELDS = 1024
"""Most fields of a request that are looked at; one with more is left to protobuf."""
_FIXED = {1: 8, 5: 4}
"""Bytes of the values of wire types with a fixed size."""


class InferRequest(NamedTuple):
    """A request, and its `raw_input_contents`: views of what was received, if they are large."""

    message: ModelInferRequest
    raws: Sequence[bytes | memoryview]


def parse_request(data: bytes | memoryview) -> InferRequest:
    """Parses a request.

    Raises:
        google.protobuf.message.DecodeError: it is no such message.
    """
    if len(data) >= LARGE:
        view = memoryview(data)
        found = _split(view)
        if found is not None:
            rest, raws = found
            return InferRequest(ModelInferRequest.FromString(rest), raws)
        data = bytes(data)
    message = ModelInferRequest.FromString(bytes(data))
    return InferRequest(message, message.raw_input_contents)


def first_tensor(head: bytes) -> int | None:
    """Where the first raw input begins in a request, from its first bytes; None: not in these bytes."""
    view, at = memoryview(head), 0
    try:
        for _ in range(_FIELDS):
            tag, start = _number(view, at)
            size, start = _size(view, tag, start)
            if tag == _RAW_INPUT:
                return start
            at = start + size
    except DecodeError:
        pass
    return None


def encoded(reply: ModelInferResponse, tensors: Sequence[OipTensor], *, streamed: bool = False) -> Reply:
    """A reply with its outputs.

    Args:
        reply: without outputs; they are added.
        streamed: make it a reply of a stream.
    """
    for tensor in tensors:
        reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    if not any(isinstance(tensor.data, np.ndarray) and tensor.data.nbytes >= LARGE for tensor in tensors):
        reply.raw_output_contents.extend(to_raw(tensor) for tensor in tensors)
        return ModelStreamInferResponse(infer_response=reply) if streamed else reply
    parts: list[bytes | memoryview] = [reply.SerializeToString()]
    for tensor in tensors:
        raw = _memory(tensor)
        parts += [bytes((_RAW_OUTPUT,)) + _varint(len(raw)), raw]
    if streamed:
        parts.insert(0, bytes((_INFER_RESPONSE,)) + _varint(sum(len(part) for part in parts)))
    return Encoded(parts)


def _memory(tensor: OipTensor) -> bytes | memoryview:
    """The raw form of a tensor: the array's own memory if its elements lie there in order."""
    data = tensor.data
    if isinstance(data, np.ndarray) and data.nbytes and data.flags.c_contiguous:
        return data.reshape(-1).view(np.uint8).data
    return to_raw(tensor)


def _split(data: memoryview) -> tuple[bytes, list[memoryview]] | None:
    """The request without its raw inputs, and these; None if protobuf must read it."""
    rest: list[memoryview] = []
    raws: list[memoryview] = []
    at = 0
    try:
        for _ in range(_FIELDS):
            if at == len(data):
                return b"".join(rest), raws
            tag, start = _number(data, at)
            size, start = _size(data, tag, start)
            if start + size > len(data):
                return None  # protobuf says what is wrong
            if tag == _RAW_INPUT:
                raws.append(data[start : start + size])
            else:
                rest.append(data[at : start + size])
            at = start + size
    except DecodeError:
        pass
    return None


def _size(data: memoryview, tag: int, start: int) -> tuple[int, int]:
    """The size of a field's value, and where it begins. Args: start: behind its tag."""
    kind = tag & 7
    if kind == 2:
        return _number(data, start)
    if kind == 0:
        return _number(data, start)[1] - start, start
    if kind in _FIXED:
        return _FIXED[kind], start
    raise DecodeError(f"wire type {kind} is not used")


def _number(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and what follows it: seven bits a byte, the lowest first."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise DecodeError("a number is not complete")


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
