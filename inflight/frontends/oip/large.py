"""Requests and replies of gRPC whose large tensors stay where they are: the arrays view the request's bytes, and the
reply is sent from the arrays' memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inflight.frontends.oip.tensors import OipTensor, to_raw
from inflight.frontends.protobuf import LARGE, Unusual, fields, is_large, memory, tag_of, wrapped
from inflight.proto.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from inflight.wire import Encoded, Reply

_RAW_INPUT, _RAW_OUTPUT, _INFER_RESPONSE = tag_of(7), tag_of(6), tag_of(2)
"""`ModelInferRequest.raw_input_contents`, `ModelInferResponse.raw_output_contents`, and
`ModelStreamInferResponse.infer_response`."""


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
        rest: list[memoryview] = []
        raws: list[memoryview] = []
        try:
            for field in fields(view):
                if field.tag == _RAW_INPUT:
                    raws.append(view[field.value : field.end])
                else:
                    rest.append(view[field.begin : field.end])
            return InferRequest(ModelInferRequest.FromString(b"".join(rest)), raws)
        except Unusual:
            pass
    message = ModelInferRequest.FromString(bytes(data))
    return InferRequest(message, message.raw_input_contents)


def first_tensor(head: bytes) -> int | None:
    """Where the first raw input begins in a request, from its first bytes; None: not in these bytes."""
    try:
        return next((field.value for field in fields(memoryview(head)) if field.tag == _RAW_INPUT), None)
    except Unusual:
        return None


def encoded(reply: ModelInferResponse, tensors: Sequence[OipTensor], *, streamed: bool = False) -> Reply:
    """A reply with its outputs.

    Args:
        reply: without outputs; they are added.
        streamed: make it a reply of a stream.
    """
    for tensor in tensors:
        reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    if not any(is_large(tensor.data) for tensor in tensors):
        reply.raw_output_contents.extend(to_raw(tensor) for tensor in tensors)
        return ModelStreamInferResponse(infer_response=reply) if streamed else reply
    parts: list[bytes | memoryview] = [reply.SerializeToString()]
    for tensor in tensors:
        raw = memory(tensor.data) if isinstance(tensor.data, np.ndarray) else to_raw(tensor)
        parts += wrapped(_RAW_OUTPUT, [raw])
    return Encoded(wrapped(_INFER_RESPONSE, parts) if streamed else parts)
