"""Bodies of the Open Inference Protocol over REST: JSON, alone or with the tensors' raw bytes behind it.

With the binary tensor extension the header `Inference-Header-Content-Length` gives the length of the JSON part; the
raw tensors follow in the order of their entries, each with its size in `parameters.binary_data_size`. Inputs view
the body and outputs are sent as views: neither is copied here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson

from inflight.contract import Array
from inflight.errors import InvalidRequest
from inflight.frontends.json_outputs import words
from inflight.frontends.oip.classes import check_classes
from inflight.frontends.oip.mapping import request_priority, request_timeout
from inflight.frontends.oip.plain import parse_plain
from inflight.frontends.oip.sequences import NO_PART, Part
from inflight.frontends.oip.tensors import OipTensor, check_shape, from_elements, from_raw, numpy_dtype, to_raw
from inflight.wire import Body

_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}
"""For the kind of each numeric datatype, the kinds of JSON numbers it takes: a fraction is no integer."""
_BARE = re.compile(rb"[\[,:]\s*-?(?:NaN|Infinity)\b")
"""The words of numbers that JSON does not have, as some clients write them."""
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class InferRequest(msgspec.Struct, frozen=True):
    """The request that a body describes.

    Attributes:
        id: repeated in the answer, or None.
        outputs: names of the requested outputs, in order; empty for all.
        binary: whether each of `outputs` is requested in raw form.
        binary_default: the same for outputs that are not named.
        timeout: seconds, or None.
        classes: for each output that is wanted as a classification, the number of classes.
        part: its place in a sequence.
        priority: 1 is the highest; 0: none is named.
    """

    id: str | None
    inputs: list[OipTensor]
    outputs: list[str]
    binary: dict[str, bool]
    binary_default: bool
    timeout: float | None
    classes: dict[str, int] = {}
    part: Part = NO_PART
    priority: int = 0


def parse_request(body: Body, json_length: int | None) -> InferRequest:
    """Reads the request from a body.

    Args:
        json_length: bytes of the JSON part if raw tensors follow it, else None.

    Raises:
        InvalidRequest: the body is not JSON, not of the protocol, or its raw part does not fit.
    """
    if json_length is None:
        plain = parse_plain(body)
        if plain is not None:
            return InferRequest(plain[1], plain[0], [], {}, False, None)
    view = memoryview(body)
    if json_length is not None and json_length > len(view):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {json_length}, but the body has only {len(view)} bytes"
        )
    split = len(view) if json_length is None else json_length
    try:
        document = orjson.loads(view[:split])
    except orjson.JSONDecodeError as error:
        hint = "" if json_length is not None else "; for raw tensors set Inference-Header-Content-Length"
        if _BARE.search(view[:split]):
            hint = (
                '; JSON has no NaN and no Infinity: write them as strings ("NaN", "-Infinity"), or send the tensor raw '
                "(binary_data_size)"
            )
        raise InvalidRequest(f"the request is not valid JSON: {error}{hint}") from None
    if not isinstance(document, dict):
        raise InvalidRequest('the request must be a JSON object like {"inputs": [...]}')
    request_id = _field(document, "id", (str,), None, "the request")
    parameters = _field(document, "parameters", (dict,), {}, "the request")
    outputs, binary, classes = _wanted(document, _flag(parameters, "binary_data_output", False))
    return InferRequest(
        id=request_id,
        inputs=_inputs(document, view[split:]),
        outputs=outputs,
        binary=binary,
        binary_default=_flag(parameters, "binary_data_output", False),
        timeout=request_timeout(parameters.get("timeout")),
        classes=classes,
        part=Part.of(parameters) if parameters else NO_PART,
        priority=request_priority(parameters.get("priority")),
    )


def encode_response(
    model: str, version: int, request: InferRequest, tensors: Sequence[OipTensor]
) -> tuple[list[Body], bool]:
    """The answer as parts to be sent in order, the JSON first, and whether raw tensors follow it.

    Raises:
        InvalidRequest: an output of bytes is requested as JSON and is not UTF-8.
    """
    entries: list[dict[str, Any]] = []
    parts: list[Body] = [b""]
    for tensor in tensors:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if request.binary.get(tensor.name, request.binary_default):
            raw = _raw(tensor)
            entry["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            entry["data"] = _json_data(tensor)
        entries.append(entry)
    answer = {"model_name": model, "model_version": str(version), "outputs": entries}
    if request.id is not None:
        answer["id"] = request.id
    parts[0] = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in parts[0]:  # orjson writes NaN and infinities as null; to check every array first would cost more
        for entry in entries:
            if "data" in entry:
                entry["data"] = _said(entry["data"])
        parts[0] = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return parts, len(parts) > 1


def _field(owner: dict[str, Any], name: str, types: tuple[type, ...], default: Any, where: str) -> Any:
    """A field of a JSON object, `default` if it is missing or null."""
    value = owner.get(name)
    if value is None:
        return default
    # bool is an int to Python, but not to the protocol.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        kinds = {str: "a string", dict: "an object", list: "an array", int: "an integer", bool: "true or false"}
        raise InvalidRequest(f"'{name}' of {where} must be {kinds[types[0]]}")
    return value


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    return bool(_field(parameters, name, (bool,), default, "the parameters"))


def _entries(document: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, entry and parameters of each tensor listed under `name`."""
    found = []
    for index, entry in enumerate(_field(document, name, (list,), [], "the request")):
        where = f"{name}[{index}]"
        if not isinstance(entry, dict):
            raise InvalidRequest(f"{where} must be an object with a 'name'")
        title = _field(entry, "name", (str,), None, where)
        if not title:
            raise InvalidRequest(f"'name' of {where} is missing")
        parameters = _field(entry, "parameters", (dict,), {}, where)
        if "shared_memory_region" in parameters:
            raise InvalidRequest(f"'{title}' is in shared memory, which this server does not offer: send its data")
        found.append((title, entry, parameters))
    return found


def _wanted(document: dict[str, Any], default: bool) -> tuple[list[str], dict[str, bool], dict[str, int]]:
    names: list[str] = []
    binary: dict[str, bool] = {}
    classes: dict[str, int] = {}
    for name, _, parameters in _entries(document, "outputs"):
        if count := _field(parameters, "classification", (int,), 0, f"output '{name}'"):
            classes[name] = check_classes(name, count)
        names.append(name)
        binary[name] = _flag(parameters, "binary_data", default)
    if len(binary) != len(names):
        raise InvalidRequest("an output is wanted twice, name each one once")
    return names, binary, classes


def _inputs(document: dict[str, Any], raw: memoryview) -> list[OipTensor]:
    tensors: list[OipTensor] = []
    at = 0
    for name, entry, parameters in _entries(document, "inputs"):
        where = f"input '{name}'"
        datatype = _field(entry, "datatype", (str,), "", where)
        shape = check_shape(name, _shape(entry, where))
        size = _field(parameters, "binary_data_size", (int,), None, where)
        if size is None:
            data = _field(entry, "data", (list,), None, where)
            if data is None:
                raise InvalidRequest(f"{where} has no data: give 'data', or 'binary_data_size' and raw bytes")
            tensors.append(_from_json(name, datatype, shape, data))
            continue
        if not 0 <= size <= len(raw) - at:
            raise InvalidRequest(
                f"{where} has the binary_data_size {size}, but {len(raw) - at} bytes are left in the body"
            )
        tensors.append(_from_raw(name, datatype, shape, raw[at : at + size]))
        at += size
    if not tensors:
        raise InvalidRequest("the request has no inputs")
    if at != len(raw):
        raise InvalidRequest(f"{len(raw) - at} bytes of the body belong to no input, check each binary_data_size")
    return tensors


def _shape(entry: dict[str, Any], where: str) -> list[int]:
    shape: list[Any] = _field(entry, "shape", (list,), None, where)
    if shape is None or any(type(dim) is not int for dim in shape):
        raise InvalidRequest(f"'shape' of {where} must be an array of integers")
    return shape


def _from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> OipTensor:
    tensor = from_raw(name, datatype, shape, raw)
    if isinstance(tensor.data, np.ndarray) and not tensor.data.flags.aligned:
        # A small body may be at an unaligned address; runtimes expect aligned arrays.
        return OipTensor(name, datatype, tensor.shape, tensor.data.copy())
    return tensor


def _from_json(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> OipTensor:
    """A tensor from JSON, flat or nested."""
    if datatype == "BYTES":
        return from_elements(name, datatype, shape, _texts(name, data))
    dtype = numpy_dtype(name, datatype)
    try:
        found: Array = np.array(data)
        if dtype.kind == "f" and found.dtype.kind in "UO":
            found = _unsaid(name, datatype, data)
        if dtype.kind == "u" and found.dtype.kind == "f":  # so numpy reads integers beyond int64 beside small ones
            found = _whole_numbers(data, found)
        if found.size and (not _fits(found, dtype) or (dtype.kind != "b" and _has_flags(data, found))):
            raise InvalidRequest(f"input '{name}' holds an element that is not {datatype}")
        return OipTensor(name, datatype, shape, _converted(found, dtype).reshape(shape))
    except (ValueError, OverflowError) as error:  # ragged lists, or a number of elements that does not match the shape
        raise InvalidRequest(f"the data of input '{name}' does not fit its shape {list(shape)}: {error}") from None


def _unsaid(name: str, datatype: str, data: list[Any]) -> Array:
    """An array from numbers and the words that answers use for NaN and infinities."""
    found: Array = np.array(data, object)
    try:
        flat = [_WORDS[item] if type(item) is str else _number(item) for item in found.flat]
    except (KeyError, TypeError):
        raise InvalidRequest(
            f'input \'{name}\' holds an element that is not {datatype}: numbers are, and "NaN", "Infinity" and '
            '"-Infinity"'
        ) from None
    read: Array = np.array(flat, np.float64).reshape(found.shape)
    return read


def _number(item: Any) -> float:
    if type(item) is not float and type(item) is not int:
        raise TypeError
    return float(item)


def _converted(found: Array, dtype: np.dtype[Any]) -> Array:
    if found.dtype.kind != "f" or dtype.itemsize >= found.dtype.itemsize:
        return found.astype(dtype)
    with np.errstate(over="ignore"):  # numbers beyond FP16 or FP32 become infinity
        return found.astype(dtype)


def _whole_numbers(data: list[Any], found: Array) -> Array:
    """The numbers as uint64 if all are integers, else `found`; OverflowError if one is out of range."""
    exact: Array = np.array(data, object)
    return exact.astype(np.uint64) if all(type(item) is int for item in exact.flat) else found


def _fits(found: Array, dtype: np.dtype[Any]) -> bool:
    """Whether JSON numbers, as numpy read them, all fit this type."""
    if found.dtype.kind not in _KINDS[dtype.kind]:
        return False
    if dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    return bool(int(found.min()) >= limits.min and int(found.max()) <= limits.max)


def _has_flags(data: list[Any], found: Array) -> bool:
    """Whether there is a true or false among the numbers. numpy reads them as 1 and 0, so without a 1 or 0 there is
    none."""
    if not ((found == 0) | (found == 1)).any():
        return False
    for _ in found.shape[1:]:
        data = [item for row in data for item in row]
    return bool in set(map(type, data))


def _texts(name: str, data: list[Any]) -> list[bytes]:
    """The elements of a BYTES tensor, row by row."""
    while data and isinstance(data[0], list):
        if not all(isinstance(item, list) for item in data):
            break
        data = [element for row in data for element in row]
    if not all(isinstance(item, str) for item in data):
        raise InvalidRequest(f"input '{name}' of datatype BYTES takes strings; send bytes that are no text raw")
    return [item.encode() for item in data]


def _raw(tensor: OipTensor) -> Body:
    """The raw form; of an array, a view."""
    if isinstance(tensor.data, np.ndarray) and tensor.data.size:
        return np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).data
    return to_raw(tensor)


def _said(data: Any) -> Any:
    """The elements with NaN as null and infinities as words, because JSON has no numbers for them."""
    floats = isinstance(data, np.ndarray) and data.dtype.kind == "f"
    return words(data) if floats and not np.isfinite(data).all() else data


def _json_data(tensor: OipTensor) -> Any:
    """The elements row by row, as orjson takes them."""
    if isinstance(tensor.data, np.ndarray):
        return np.ascontiguousarray(tensor.data).reshape(-1) if tensor.data.size else []
    try:
        return [item.decode() for item in tensor.data]
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"output '{tensor.name}' holds bytes that are no UTF-8 text ({error}), ask for it with binary_data true"
        ) from None
