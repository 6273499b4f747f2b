"""`MSService.Predict`: MindSpore Serving's one remote procedure.

Errors of a request are part of the reply, not a gRPC status: a reply holds results, one error for the whole request, or
a list of both. Only a servable that is not loaded yet is answered with UNAVAILABLE. Arrays view the received bytes, so
they are read-only; of large ones workers read the same memory, of small ones they get copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from inflight.admission import Caller
from inflight.contract import (
    BYTES_CODE,
    DTYPES,
    IMAGE,
    STRING_CODE,
    MethodInfo,
    Outcome,
    Row,
    Table,
    Value,
    reads_images,
    text_only,
)
from inflight.errors import OVERLOADED, InflightError, InvalidRequest, Loading, Overloaded
from inflight.frontends.base import Backend
from inflight.frontends.images import KEYS, image_of
from inflight.frontends.mindspore.large import LargeRequest, encoded, first_tensor, parse_request, put
from inflight.frontends.protobuf import LARGE, is_large
from inflight.proto.ms_service_pb2 import Instance, PredictReply, Tensor
from inflight.wire import Go, Reply, Rpc, UnaryRpc, nothing_to_cancel

if TYPE_CHECKING:
    from inflight.frontends.grpc.line import HoldingBackend

PATH = "/mindspore.serving.proto.MSService/Predict"
MAX_ELEMENTS = 2**32 - 1
MAX_RANK = 32
_TEXTUAL = (STRING_CODE, BYTES_CODE)


def predict_rpcs(backend: HoldingBackend) -> dict[str, Rpc]:
    """The service's procedures by path."""

    def begin(
        request: LargeRequest, timeout: float | None, done: Callable[[Reply | Exception], None]
    ) -> Callable[[], None] | None:
        _direct(backend, request)
        if backend.missing(request.message.servable_spec.name):
            return None
        reply = _begun(request)
        try:
            method = _method(backend, request)
            if backend.waits(method):
                return None
            answer = partial(_answer, method, reply, done)
            return backend.submit(method, _rows(method, request), answer, timeout=timeout)
        except Loading:
            raise
        except InflightError as error:
            _add_error(reply, error)
        done(reply)
        return nothing_to_cancel

    async def predict(request: LargeRequest, timeout: float | None) -> Reply:
        _direct(backend, request)
        reply = _begun(request)
        try:
            timeout = await backend.present(request.message.servable_spec.name, timeout)
            method = _method(backend, request)
            work = backend.predict(method, _rows(method, request), timeout=timeout)
            del request  # the work does not need it, and may take long
            outcomes = await work
        except Loading:
            raise
        except InflightError as error:
            _add_error(reply, error)
        else:
            return _filled(reply, method, outcomes)
        return reply

    def hold(request: LargeRequest, name_of: Callable[[], object], go: Go) -> Caller | None:
        return backend.hold(lambda: _method(backend, request), name_of, go)

    def refusal(request: LargeRequest) -> PredictReply:
        reply = _begun(request)
        _add_error(reply, Overloaded(OVERLOADED))
        return reply

    return {PATH: UnaryRpc(parse_request, predict, begin, hold, refusal, first_tensor)}


def _direct(backend: HoldingBackend, request: LargeRequest) -> None:
    """Writes the servable behind an alias into a request."""
    spec = request.message.servable_spec
    target = backend.target(spec.name, spec.version_number)
    if target != (spec.name, spec.version_number):
        spec.name, spec.version_number = target


def _begun(request: LargeRequest) -> PredictReply:
    reply = PredictReply()
    reply.servable_spec.CopyFrom(request.message.servable_spec)
    return reply


def _answer(
    method: MethodInfo,
    reply: PredictReply,
    done: Callable[[Reply | Exception], None],
    result: Sequence[Outcome] | InflightError,
) -> None:
    if isinstance(result, Loading):
        done(result)
        return
    answer: Reply = reply
    try:
        if isinstance(result, InflightError):
            _add_error(reply, result)
        else:
            answer = _filled(reply, method, result)
    except Exception as error:  # the gRPC engine answers it, like any handler's error
        done(error)
    else:
        done(answer)


def _method(backend: Backend, request: LargeRequest) -> MethodInfo:
    spec = request.message.servable_spec
    return backend.method(spec.name, spec.version_number, spec.method_name)


def _rows(method: MethodInfo, request: LargeRequest) -> list[Row]:
    """The instances' inputs in the method's order."""
    instances = request.message.instances
    if not instances:
        raise InvalidRequest("the request holds no instance, give at least one")
    names = [spec.name for spec in method.inputs]
    return [_row(method, names, instance, request.data_of(index)) for index, instance in enumerate(instances)]


def _row(method: MethodInfo, names: list[str], instance: Instance, data: Mapping[str, memoryview]) -> Row:
    if instance.output_buffers:
        raise InvalidRequest("output_buffers are not accepted from clients, leave them out: results come in the reply")
    items = instance.items
    if method.optional:
        return _generation_row(method, instance, data)
    return method.row({name: _value(name, items[name], data.get(name)) for name in names if name in items})


def _generation_row(method: MethodInfo, instance: Instance, data: Mapping[str, memoryview]) -> Row:
    """The row of a language model: a text, its images or a second text, its parameters."""
    items = instance.items
    images = [image for name in KEYS if name in items for image in _images(name, items[name], data)]
    if images and not reads_images(method):
        raise text_only(method.servable)
    names = [spec.name for spec in method.inputs if spec.name != IMAGE]
    named = {name: _value(name, items[name], data.get(name)) for name in names if name in items}
    text, *more = method.row(named)[: len(names)]
    return [text, *images, *more]


def _images(name: str, tensor: Tensor, data: Mapping[str, memoryview]) -> list[Value]:
    """The images of a tensor: bytes of files, or pixels."""
    if tensor.dtype in _TEXTUAL:
        return [image_of(value) for value in tensor.bytes_val]
    return [_value(name, tensor, data.get(name))]


def _value(name: str, tensor: Tensor, large: memoryview | None = None) -> Value:
    """A tensor's content: an array that views the message, a text, or bytes. Args: large: its data, apart from it."""
    code = tensor.dtype
    dims = tensor.shape.dims
    if code in _TEXTUAL:
        return _textual(name, tensor, code, dims)
    dtype = DTYPES.get(code)
    if dtype is None:
        raise InvalidRequest(
            f"Tensor check failed: input '{name}' has the unknown data type {code}, use one of 1 (MS_BOOL) to "
            f"{BYTES_CODE} (MS_BYTES)"
        )
    data = tensor.data if large is None else large
    if not data and tensor.HasField("shm_data"):
        raise InvalidRequest(f"input '{name}': shm_data is not accepted from clients, send the bytes in data")
    count = math.prod(dims)
    if count * dtype.itemsize != len(data) or count <= 0 or min(dims, default=0) < 0 or len(dims) > MAX_RANK:
        _check_dims(name, dims)
        if count * dtype.itemsize != len(data):
            raise InvalidRequest(
                f"Tensor check failed: input '{name}' data size {len(data)} not match the shape {list(dims)} and data "
                f"type {dtype.name}, which take {count * dtype.itemsize} bytes"
            )
    array = np.frombuffer(data, dtype)
    return array if len(dims) == 1 else array.reshape(dims)


def _check_dims(name: str, dims: Sequence[int]) -> None:
    if (
        any(dim < 0 for dim in dims)
        or 0 in dims[:-1]
        or len(dims) > MAX_RANK
        or math.prod(dim for dim in dims if dim) > MAX_ELEMENTS
    ):
        raise InvalidRequest(
            f"Tensor check failed: input '{name}' has the invalid shape {list(dims)}: at most {MAX_RANK} dimensions, "
            f"all >= 0, only the last may be 0, and at most {MAX_ELEMENTS} elements"
        )


def _textual(name: str, tensor: Tensor, code: int, dims: Sequence[int]) -> Value:
    """The one element of a text or bytes tensor."""
    if len(dims) and list(dims) != [1]:
        raise InvalidRequest(
            f"bytes or string type input  shape can only be (1,) or empty, but given shape is {list(dims)}"
        )
    values = tensor.bytes_val
    if len(values) != 1:
        raise InvalidRequest(
            f"bytes or string type input  '{name}' must have one element in bytes_val, but it has {len(values)}"
        )
    if code == BYTES_CODE:
        return values[0]
    try:
        return values[0].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"string type input '{name}' must be UTF-8, send other bytes as MS_BYTES: {error}"
        ) from None


def _filled(reply: PredictReply, method: MethodInfo, outcomes: Sequence[Outcome]) -> Reply:
    """Fills one of the three forms of a reply: results; one error; or both lists, with code 0 for each success."""
    errors: list[InflightError] = []
    if type(outcomes) is not Table:
        errors = [outcome for outcome in outcomes if isinstance(outcome, InflightError)]
    if errors and len(errors) == len(outcomes):
        first = errors[0]
        if all(error.mindspore_code == first.mindspore_code and error.message == first.message for error in errors):
            _add_error(reply, first)
            return reply
    names = [spec.name for spec in method.outputs]
    if not errors and _has_large(outcomes):
        rows = [row for row in outcomes if not isinstance(row, InflightError)]
        return encoded(reply, [dict(zip(names, row, strict=True)) for row in rows])
    for outcome in outcomes:
        instance = reply.instances.add()
        if isinstance(outcome, InflightError):
            _add_error(reply, outcome)
            continue
        if errors:
            reply.error_msg.add()
        items = instance.items
        for name, value in zip(names, outcome, strict=True):
            put(items[name], value)
    return reply


def _has_large(outcomes: Sequence[Outcome]) -> bool:
    """Whether an output is a large array. No row of a table is made for this."""
    if type(outcomes) is Table:
        return outcomes.reaches(LARGE)
    return any(is_large(value) for row in outcomes if not isinstance(row, InflightError) for value in row)


def _add_error(reply: PredictReply, error: InflightError) -> None:
    reply.error_msg.add(error_code=error.mindspore_code, error_msg=error.message.encode(errors="replace"))
