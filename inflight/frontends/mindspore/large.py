"""Requests and replies of `MSService.Predict` whose large tensors stay where they are: the arrays view the request's
bytes, and the reply is sent from the arrays' memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from inflight.contract import BYTES_CODE, CODES, STRING_CODE, Texts
from inflight.frontends.protobuf import LARGE, Unusual, fields, is_large, memory, tag_of, wrapped
from inflight.proto.ms_service_pb2 import Instance, PredictReply, PredictRequest, Tensor
from inflight.wire import Encoded

_INSTANCES, _ITEMS, _KEY, _VALUE, _DATA, _SHM_DATA = tag_of(2), tag_of(1), tag_of(1), tag_of(2), tag_of(3), tag_of(5)
"""`PredictRequest.instances`, `Instance.items`, the key and the value of an entry of a map, `Tensor.data` and
`Tensor.shm_data`."""
_REPLY_INSTANCES = tag_of(3)
_NOTHING: Mapping[str, memoryview] = {}
Parts = list[bytes | memoryview]


class LargeRequest(NamedTuple):
    """A request, and the `data` of its large tensors by name, for each instance; they are empty in the message."""

    message: PredictRequest
    data: Sequence[Mapping[str, memoryview]]

    def data_of(self, instance: int) -> Mapping[str, memoryview]:
        return self.data[instance] if self.data else _NOTHING


def parse_request(data: bytes | memoryview) -> LargeRequest:
    """Parses a request.

    Raises:
        google.protobuf.message.DecodeError: it is no such message.
    """
    if len(data) >= LARGE:
        try:
            found: list[dict[str, memoryview]] = []
            rest = _request(memoryview(data), found)
            return LargeRequest(PredictRequest.FromString(b"".join(rest)), found)
        except (Unusual, UnicodeDecodeError):
            pass
    return LargeRequest(PredictRequest.FromString(bytes(data)), ())


def first_tensor(head: bytes) -> int | None:
    """Where the first tensor's data begin in a request, from its first bytes; None: not in these bytes."""
    view, begin = memoryview(head), 0
    for wanted in (_INSTANCES, _ITEMS, _VALUE, _DATA):
        try:
            at = next((field.value for field in fields(view[begin:]) if field.tag == wanted), None)
        except Unusual:
            return None
        if at is None:
            return None
        begin += at
    return begin


def _request(view: memoryview, found: list[dict[str, memoryview]]) -> Parts:
    """The message without its large tensors' data, which are added to `found`."""
    rest: Parts = []
    for field in fields(view):
        if field.tag != _INSTANCES:
            rest.append(view[field.begin : field.end])
            continue
        found.append({})
        if field.end - field.value < LARGE:
            rest.append(view[field.begin : field.end])
        else:
            rest += wrapped(_INSTANCES, _instance(view[field.value : field.end], found[-1]))
    return rest


def _instance(view: memoryview, found: dict[str, memoryview]) -> Parts:
    rest: Parts = []
    keys: list[str] = []
    for field in fields(view):
        if field.tag != _ITEMS:
            rest.append(view[field.begin : field.end])
            continue
        entry = view[field.value : field.end]
        parts = list(fields(entry))
        if [part.tag for part in parts] != [_KEY, _VALUE]:
            raise Unusual
        name, tensor = (entry[part.value : part.end] for part in parts)
        key = str(name, "utf-8")
        keys.append(key)
        if len(tensor) >= LARGE:
            tensor_rest, data = _tensor(tensor)
            if data is not None:
                found[key] = data
            rest += wrapped(_ITEMS, [*wrapped(_KEY, [name]), *wrapped(_VALUE, tensor_rest)])
        else:
            rest.append(view[field.begin : field.end])
    if len(set(keys)) < len(keys):  # the last of them holds
        raise Unusual
    return rest


def _tensor(view: memoryview) -> tuple[Parts, memoryview | None]:
    """A tensor without its data, and these."""
    rest: Parts = []
    data: memoryview | None = None
    for field in fields(view):
        if field.tag == _SHM_DATA or (field.tag == _DATA and data is not None):
            raise Unusual  # the last of them holds
        if field.tag == _DATA:
            data = view[field.value : field.end]
        else:
            rest.append(view[field.begin : field.end])
    return rest, data


def encoded(reply: PredictReply, rows: Sequence[Mapping[str, Any]]) -> Encoded:
    """A reply whose instances are these outputs by name, some of them large arrays.

    Args:
        reply: without instances.
    """
    parts: Parts = [reply.SerializeToString()]
    for row in rows:
        small = Instance()
        large: Parts = []
        for name, value in row.items():
            if not is_large(value):
                put(small.items[name], value)
                continue
            tensor: Any = Tensor()
            tensor.dtype = CODES[value.dtype]
            tensor.shape.dims.extend(value.shape)
            whole: Parts = [tensor.SerializeToString(), *wrapped(_DATA, [memory(value)])]
            large += wrapped(_ITEMS, [*wrapped(_KEY, [name.encode()]), *wrapped(_VALUE, whole)])
        parts += wrapped(_REPLY_INSTANCES, [small.SerializeToString(), *large])
    return Encoded(parts)


def put(tensor: Any, value: Any) -> None:
    """Fills a tensor of a reply with a value."""
    if isinstance(value, np.ndarray):
        tensor.dtype = CODES[value.dtype]
        tensor.shape.dims.extend(value.shape)
        tensor.data = value.tobytes()
    elif isinstance(value, str):
        tensor.dtype = STRING_CODE
        tensor.bytes_val.append(value.encode())
    elif isinstance(value, Texts):
        strings = [item.encode() for item in value.items if isinstance(item, str)]
        tensor.dtype = STRING_CODE if len(strings) == len(value.items) else BYTES_CODE
        tensor.shape.dims.extend(value.shape)
        tensor.bytes_val.extend(strings or value.items)
    else:
        tensor.dtype = BYTES_CODE
        tensor.bytes_val.append(bytes(value))
