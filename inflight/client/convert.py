"""Python values to `PredictRequest` and `PredictReply` back to Python values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from inflight.contract import BYTES_CODE, CODES, DTYPES, STRING_CODE
from inflight.errors import InvalidRequest, ModelError
from inflight.proto import ms_service_pb2

Instance: TypeAlias = Mapping[str, Any]
"""Inputs of one instance by name: numpy array or number, bool, int, float, str or bytes."""
Result: TypeAlias = "list[dict[str, Any]] | dict[str, Any]"
"""One dict per instance, `{"error": text}` where one failed; or a single such dict when the request failed."""


def fill_tensor(tensor: ms_service_pb2.Tensor, value: object) -> None:
    """Writes `value` into an empty tensor message.

    numpy arrays and numbers keep their shape (a number has no dimensions); Python's bool, int and float become
    arrays of shape [1] of bool, int64 and float64; str and bytes have shape [1].

    Raises:
        InvalidRequest: a value or an array of another type.
    """
    if isinstance(value, (np.ndarray, np.number)):
        _fill_array(tensor, value)
    elif isinstance(value, str):
        _fill_text(tensor, STRING_CODE, value.encode())
    elif isinstance(value, (bool, int, float)):
        _fill_array(tensor, np.array((value,)))
    elif isinstance(value, bytes):
        _fill_text(tensor, BYTES_CODE, value)
    else:
        raise InvalidRequest(
            f"Not support value type {type(value)}; pass a numpy array or number, bool, int, float, str or bytes "
            "(a list: numpy.array(values, dtype=...))"
        )


def _fill_array(tensor: ms_service_pb2.Tensor, value: np.ndarray[Any, Any] | np.number[Any]) -> None:
    code: Any = CODES.get(value.dtype)  # the enum's own type exists for type checkers only
    if code is None:
        raise InvalidRequest(
            f"Unknown data type {value.dtype}; convert the array with astype to one of: "
            f"{', '.join(str(dtype) for dtype in CODES)}"
        )
    tensor.shape.dims.extend(value.shape)
    tensor.dtype = code
    tensor.data = value.tobytes()


def _fill_text(tensor: ms_service_pb2.Tensor, code: Any, value: bytes) -> None:
    tensor.shape.dims.append(1)
    tensor.dtype = code
    tensor.bytes_val.append(value)


def tensor_value(tensor: ms_service_pb2.Tensor) -> Any:
    """A tensor message as a read-only array, a str or bytes (a list of them unless there is exactly one).

    Raises:
        ModelError: the server sent data that its shape and type do not describe.
    """
    if tensor.dtype == STRING_CODE:
        texts = [item.decode() for item in tensor.bytes_val]
        return texts[0] if len(texts) == 1 else texts
    if tensor.dtype == BYTES_CODE:
        return tensor.bytes_val[0] if len(tensor.bytes_val) == 1 else list(tensor.bytes_val)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ModelError(f"The server sent a tensor of the unknown data type {tensor.dtype}; update this client")
    try:
        return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape.dims))
    except ValueError as error:
        raise ModelError(
            f"The server sent {len(tensor.data)} bytes for a tensor of type {dtype} and shape "
            f"{list(tensor.shape.dims)}: {error}"
        ) from error


def build_request(servable: str, method: str, version: int, instances: object) -> ms_service_pb2.PredictRequest:
    """The message for one instance (a dict) or several (a tuple or list of dicts).

    Raises:
        InvalidRequest: an instance is not a dict with str keys, or holds a value that cannot be sent.
    """
    items: Sequence[object] = instances if isinstance(instances, (tuple, list)) else (instances,)
    request = ms_service_pb2.PredictRequest()
    request.servable_spec.name = servable
    request.servable_spec.method_name = method
    request.servable_spec.version_number = version
    for item in items:
        if not isinstance(item, dict):
            raise InvalidRequest(
                f"instance should be a map, from input name to value like {{'x': array}}, not {type(item)}"
            )
        message = request.instances.add()
        for name, value in item.items():
            if not isinstance(name, str):
                raise InvalidRequest(f"The name of an input should be str, but actually {type(name)}")
            fill_tensor(message.items[name], value)
    return request


def read_reply(reply: ms_service_pb2.PredictReply) -> Result:
    """One dict per instance, or `{"error": text}` for a reply that holds exactly one error.

    Raises:
        ModelError: the reply contradicts itself.
    """
    errors = reply.error_msg
    if len(errors) == 1 and errors[0].error_code != 0:
        return {"error": _text(errors[0])}
    count = len(reply.instances)
    if len(errors) not in (0, count):
        raise ModelError(f"error msg result size {len(errors)} not be 0, 1 or length of instances {count}")
    results: list[dict[str, Any]] = []
    for index, instance in enumerate(reply.instances):
        if errors and errors[index].error_code != 0:
            results.append({"error": _text(errors[index])})
        else:
            results.append({name: tensor_value(tensor) for name, tensor in instance.items.items()})
    return results


def _text(error: ms_service_pb2.ErrorMsg) -> str:
    # A server that shortens its texts may cut through a character.
    return error.error_msg.decode(errors="replace")


def transport_error(code: Any, details: str | None) -> dict[str, Any]:
    """How a failed connection looks: `{"error": "Grpc Error, (14, 'unavailable'), <details>"}`."""
    return {"error": f"Grpc Error, {code.value}, {details}"}
