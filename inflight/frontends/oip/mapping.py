"""Maps the Open Inference Protocol (version 2) to servables, for both its REST and its gRPC door.

A method is a model. Its name is `<servable>` if the servable has one method or one called `predict`, else
`<servable>.<method>`. Servable names may contain dots themselves; the longest servable name that fits wins.
The first dimension of every input and output tensor counts instances: a request of N instances carries tensors of
shape [N, ...], all with the same N. The protocol has no error for one instance, so one failed instance fails the
request, with its index in the text. A bare model file that takes one request a call (`MethodInfo.whole`) has no such
dimension: its tensors are the model's own, and a request is one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from inflight.config import LONGEST_NAME
from inflight.contract import (
    IMAGE,
    NEWEST,
    Array,
    MethodInfo,
    Outcome,
    Row,
    ServableStatus,
    Table,
    TensorSpec,
    Texts,
    Value,
    join,
    reads_images,
    text_only,
)
from inflight.errors import InflightError, InvalidRequest, Loading, NotFound
from inflight.frontends.base import Backend
from inflight.frontends.images import KEYS, image_of
from inflight.frontends.oip.tensors import BF16, DATATYPES, NUMPY_DATATYPES, OipTensor

DEFAULT_METHOD = "predict"
UNKNOWN_DATATYPE = "ANY"
"""The datatype in metadata of a tensor of unknown type: a Python function takes any."""

ONE_REQUEST_A_CALL = "one request a call"
"""The platform in metadata of a bare model file whose first dimension is not a batch."""

MAX_INSTANCES = 100_000
"""The largest number of rows of a request: with a scalar per instance one message could become hundreds of millions of
arrays."""

_NAMES_SHOWN = 20
_NAMES_KEPT = 1024
_SPEC_DATATYPES = {dtype.name: datatype for datatype, dtype in DATATYPES.items()} | {
    "str": "BYTES",
    "bytes": "BYTES",
}


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """The description of a tensor in metadata.

    Attributes:
        datatype: of the protocol, or `ANY` if it is not known.
        shape: the first dimension counts instances and is -1, except for a model that takes one request a call. [-1]
            alone may also mean an unknown rank, which the protocol cannot express.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The description of a model in metadata; `versions` are the running ones, in ascending order.

    Attributes:
        platform: `ONE_REQUEST_A_CALL` for such a bare model file; the protocol has no other field for that.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


def find_model(backend: Backend, name: str, version: str) -> MethodInfo:
    """The method that a model name and a version text ("" or "0" is the newest) stand for.

    Raises:
        NotFound: no such servable, version or method.
        Loading: the servable is not loaded yet.
        InvalidRequest: the version is not a number.
    """
    number = parse_version(version)
    statuses = backend.servables()
    known = {status.name for status in statuses}
    servable, method = _split(name, known)
    status = _status(statuses, servable, number)
    if status is not None and not status.loaded:
        raise Loading(f"model '{name}' is still being loaded; try again later")
    if not method:
        method = _default_method(status) if status else DEFAULT_METHOD
    if servable not in known:
        raise NotFound(f"model '{name}' is not available, {_available(statuses)}")
    return backend.method(servable, number, method)


def model_names(backend: Backend) -> list[str]:
    """The names of all models that are loaded, in the order of their start."""
    names: dict[str, None] = {}
    for status in backend.servables():
        if not status.loaded:
            continue
        default = [one for one in status.methods if one.name == DEFAULT_METHOD or len(status.methods) == 1]
        for method in status.methods:
            names[status.name if method in default else f"{status.name}.{method.name}"] = None
    return list(names)


class ModelNames:
    """Remembers the results of `find_model`, which searches all servables."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[tuple[str, str], tuple[str, int, str]] = {}

    def find(self, name: str, version: str) -> MethodInfo:
        """As `find_model`."""
        known = self._known.get((name, version))
        if known is not None:
            try:
                return self._backend.method(*known)
            except InflightError:
                del self._known[name, version]
        method = find_model(self._backend, name, version)
        if len(self._known) < _NAMES_KEPT:
            self._known[name, version] = (method.servable, parse_version(version), method.name)
        return method


def parse_version(version: str) -> int:
    """The number of a version text; "" is the newest.

    Raises:
        InvalidRequest: not a number of at most 19 digits.
    """
    if not version:
        return NEWEST
    if not (version.isascii() and version.isdigit() and len(version) < 20):
        raise InvalidRequest(f"model version '{version}' is not a number, use one like '1', or '' for the newest")
    return int(version)


def request_timeout(micros: object) -> float | None:
    """The parameter `timeout` in seconds; Triton's clients send microseconds, 0 is no limit.

    Raises:
        InvalidRequest: it is not such a number.
    """
    if micros is None:
        return None
    if isinstance(micros, bool) or not isinstance(micros, int) or micros < 0:
        raise InvalidRequest("'timeout' of the parameters must be a whole number of microseconds, 0 for none")
    return micros / 1e6 or None


def request_priority(level: object) -> int:
    """The parameter `priority`: 1 is the highest, 0 none in particular.

    Raises:
        InvalidRequest: it is no such number.
    """
    if level is None:
        return 0
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < 2**32:
        raise InvalidRequest("'priority' of the parameters must be a whole number, 1 for the highest, 0 for none")
    return level


def model_ready(backend: Backend, name: str, version: str) -> bool:
    """Whether this model can answer now.

    Raises:
        NotFound, InvalidRequest: as `find_model`.
    """
    try:
        method = find_model(backend, name, version)
    except Loading:
        return False
    status = _status(backend.servables(), method.servable, method.version)
    return status is not None and status.ready


def metadata(backend: Backend, name: str, version: str) -> ModelMetadata:
    """The inputs and outputs of a model, under the name that the client used.

    Raises:
        NotFound, Loading, InvalidRequest: as `find_model`.
    """
    method = find_model(backend, name, version)
    hidden = _hidden(backend, method)
    versions = sorted(status.version for status in backend.servables() if status.name == method.servable)
    return ModelMetadata(
        name=name,
        versions=tuple(str(number) for number in versions),
        platform=f"inflight, {ONE_REQUEST_A_CALL}" if method.whole else "inflight",
        inputs=tuple(_describe(spec, method.whole) for spec in method.inputs if spec.name not in hidden),
        outputs=tuple(_describe(spec, method.whole) for spec in method.outputs if spec.name not in hidden),
    )


def _hidden(backend: Backend, method: MethodInfo) -> Sequence[str]:
    """Tensors of a stateful method that the server gives and takes."""
    status = _status(backend.servables(), method.servable, method.version) if method.stateful else None
    return status.described.hidden if status is not None and status.described is not None else ()


def check_wanted(method: MethodInfo, wanted: Sequence[str] | None) -> None:
    """Raises InvalidRequest for a requested output that the method does not have."""
    if wanted:
        _wanted(method, wanted)


def to_rows(method: MethodInfo, tensors: Sequence[OipTensor]) -> Sequence[Row]:
    """The N rows of the method's inputs in tensors of shape [N, ...]: a table of these tensors if all are arrays. A
    method that takes one request a call gets the tensors unchanged, as one row. The rows of a language model hold its
    text, its images and its parameters. An empty batch (N = 0) has no rows.

    Raises:
        InvalidRequest: an input is missing, unknown, given twice, of another type than the method declares, or
            the tensors disagree in N.
    """
    return _generation_rows(method, tensors) if method.optional else _rows(method, tensors)


def _generation_rows(method: MethodInfo, tensors: Sequence[OipTensor]) -> Sequence[Row]:
    images = [tensor for tensor in tensors if tensor.name in KEYS]
    if not reads_images(method):
        if images:
            raise text_only(method.servable)
        return _rows(method, tensors)
    others = [tensor for tensor in tensors if tensor.name not in KEYS]
    optional = tuple(each for each in method.optional if each[0] != IMAGE)
    inputs = tuple(spec for spec in method.inputs if spec.name != IMAGE)
    if others or not images:
        rows = list(_rows(replace(method, inputs=inputs, optional=optional), others))
    else:
        one = [value for _, value in optional]
        rows = [one] * (len(_images(images[0])) if images[0].name == IMAGE else 1)
    for tensor in images:
        found = _images(tensor)
        each, left = divmod(len(found), len(rows))
        if left or not each:
            raise InvalidRequest(
                f"input '{tensor.name}' has {len(found)} images for {len(rows)} instances; give each as many"
            )
        rows = [[*row[:-1], *found[index * each : (index + 1) * each], row[-1]] for index, row in enumerate(rows)]
    return rows


def _images(tensor: OipTensor) -> list[Value]:
    """The images of a tensor: bytes of files, or pixels [..., height, width, 3]."""
    if not isinstance(tensor.data, np.ndarray):
        return [image_of(item) for item in tensor.data]
    data = tensor.data
    return list(data.reshape(-1, *data.shape[-3:])) if data.ndim > 3 else [data]


def _rows(method: MethodInfo, tensors: Sequence[OipTensor]) -> Sequence[Row]:
    given = {tensor.name: tensor for tensor in tensors}
    if len(given) != len(tensors):
        raise InvalidRequest(f"an input of model '{method.servable}' is given twice, give each input once")
    left_out = [name for name in method.input_names if name not in given]
    optional = dict(method.optional) if left_out else {}
    if len(given) + len(left_out) != len(method.inputs) or not optional.keys() >= set(left_out):
        raise InvalidRequest(_names_differ(method, list(given)))
    if method.whole:
        return [[_whole(spec, given[spec.name]) for spec in method.inputs]]
    columns = {spec.name: _column(spec, given[spec.name]) for spec in method.inputs if spec.name in given}
    counts = {len(column) for column in columns.values()}
    if not counts:
        raise InvalidRequest("the request holds no input")
    if len(counts) != 1:
        listed = ", ".join(f"'{name}' {len(column)}" for name, column in columns.items())
        raise InvalidRequest(f"the first dimension is the number of instances, but the inputs disagree: {listed}")
    if counts == {0}:
        for spec in method.inputs:
            _check_shape(spec, given.get(spec.name))
        return []
    if not left_out:
        arrays = [column for column in columns.values() if isinstance(column, np.ndarray)]
        if len(arrays) == len(columns):
            return Table(arrays)
    (count,) = counts
    for name in left_out:
        columns[name] = [optional[name]] * count
    return [list(row) for row in zip(*(_each(columns[spec.name]) for spec in method.inputs))]


def _check_shape(spec: TensorSpec, tensor: OipTensor | None) -> None:
    """Checks an input without instances, which no model sees, against what the model takes."""
    if tensor is None or spec.shape is None or not isinstance(tensor.data, np.ndarray):
        return
    have = tensor.shape[1:]
    fits = len(have) == len(spec.shape) and all(want in (-1, size) for want, size in zip(spec.shape, have))
    if not fits and (-1 in spec.shape or math.prod(have) != math.prod(spec.shape)):
        raise InvalidRequest(
            f"input '{spec.name}' has instances of shape {list(have)}, the method takes {list(spec.shape)}"
        )


def _each(column: Array | list[Value]) -> list[Value]:
    return [column[index, ...] for index in range(len(column))] if isinstance(column, np.ndarray) else column


def from_outcomes(
    method: MethodInfo, outcomes: Sequence[Outcome], wanted: Sequence[str] | None = None
) -> list[OipTensor]:
    """Stacks the outputs of N instances into tensors of shape [N, ...]. Outputs of a method that takes one request a
    call stay as they are.

    Args:
        outcomes: none for an empty batch, whose outputs have no elements.
        wanted: names of the outputs to return, in this order; None or empty for all.

    Raises:
        InflightError: the error of the first failed instance, with its index before its text.
        InvalidRequest: an unknown output is requested, the instances' outputs differ in shape or type, or those of an
            empty batch are not known.
    """
    if not len(outcomes):
        return [_empty(method.outputs[at]) for at in _wanted(method, wanted)]
    if type(outcomes) is Table:
        rows: Sequence[Row] = outcomes
    else:
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, InflightError):
                raise type(outcome)(f"instance {index}: {outcome}")
        rows = outcomes  # type: ignore[assignment]  # none is an error
    if method.whole:
        return [_tensor(method.outputs[at].name, np.asarray(rows[0][at])) for at in _wanted(method, wanted)]
    table = rows if type(rows) is Table else join([rows])
    if table is not None:
        return [_tensor(method.outputs[at].name, table.columns[at]) for at in _wanted(method, wanted)]
    return [_stack(method.outputs[at].name, [row[at] for row in rows]) for at in _wanted(method, wanted)]


def _empty(spec: TensorSpec) -> OipTensor:
    """An output of no instances."""
    if spec.dtype is None or spec.shape is None or -1 in spec.shape:
        unknown = "type" if spec.dtype is None else "shape"
        raise InvalidRequest(
            f"the request holds no instance, and without one the {unknown} of output '{spec.name}' is not known; send "
            "at least one"
        )
    shape = (0, *spec.shape)
    if spec.dtype in ("str", "bytes"):
        return OipTensor(spec.name, "BYTES", shape, [])
    return _tensor(spec.name, np.empty(shape, spec.dtype))


def _split(name: str, known: set[str]) -> tuple[str, str]:
    """A model name as servable and method; method "" if the whole name is a servable or nothing fits."""
    end = len(name) if len(name) <= LONGEST_NAME else 0
    while end > 0:
        if name[:end] in known:
            return name[:end], name[end + 1 :]
        end = name.rfind(".", 0, end)
    return name, ""


def _status(statuses: Sequence[ServableStatus], servable: str, version: int) -> ServableStatus | None:
    versions = [status for status in statuses if status.name == servable]
    if version == NEWEST:
        return max(versions, key=lambda status: status.version, default=None)
    return next((status for status in versions if status.version == version), None)


def _default_method(status: ServableStatus) -> str:
    names = [method.name for method in status.methods]
    if DEFAULT_METHOD in names:
        return DEFAULT_METHOD
    if len(names) == 1:
        return names[0]
    models = ", ".join(f"{status.name}.{name}" for name in names)
    raise NotFound(f"model '{status.name}' has several methods and none is called '{DEFAULT_METHOD}', use: {models}")


def _available(statuses: Sequence[ServableStatus]) -> str:
    names = sorted({status.name for status in statuses})
    if not names:
        return "no servable is running"
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    listed = f"{', '.join(names[:_NAMES_SHOWN])}{more}"
    return f"the servables here: {listed} (a model is <servable> or <servable>.<method>)"


def _describe(spec: TensorSpec, whole: bool) -> TensorMetadata:
    datatype = UNKNOWN_DATATYPE if spec.dtype is None else _SPEC_DATATYPES.get(spec.dtype, UNKNOWN_DATATYPE)
    if whole and spec.shape is not None:
        return TensorMetadata(spec.name, datatype, spec.shape)
    return TensorMetadata(spec.name, datatype, (-1, *(spec.shape or ())))


def _names_differ(method: MethodInfo, given: list[str]) -> str:
    names = [spec.name for spec in method.inputs]
    takes = f"method '{method.name}' of servable '{method.servable}' takes: {', '.join(names) or 'nothing'}"
    missing = [name for name in names if name not in given]
    if missing:
        return f"Cannot find input {missing[0]} in the request, {takes}"
    return f"unexpected input '{next(name for name in given if name not in names)}', {takes}"


def _column(spec: TensorSpec, tensor: OipTensor) -> Array | list[Value]:
    """One input of all instances: an array [n, ...], or n texts or bytes."""
    if not tensor.shape:
        raise InvalidRequest(
            f"input '{tensor.name}' has rank 0, its first dimension must be the number of instances: use [1]"
        )
    if tensor.shape[0] > MAX_INSTANCES:
        raise InvalidRequest(
            f"input '{tensor.name}' holds {tensor.shape[0]} instances, send at most {MAX_INSTANCES} in one request"
        )
    _check_datatype(spec, tensor)
    if isinstance(tensor.data, np.ndarray):
        return tensor.data
    if len(tensor.data) != tensor.shape[0]:
        raise InvalidRequest(
            f"input '{tensor.name}' of type BYTES must have one element per instance, shape [N] or [N, 1], "
            f"but its shape is {list(tensor.shape)}"
        )
    return [_text(tensor.name, item) for item in tensor.data] if spec.dtype == "str" else list(tensor.data)


def _whole(spec: TensorSpec, tensor: OipTensor) -> Array:
    """One input of a model that takes the tensors as they are."""
    _check_datatype(spec, tensor)
    if not isinstance(tensor.data, np.ndarray):
        raise InvalidRequest(f"input '{tensor.name}' has datatype {tensor.datatype}, but a model file takes numbers")
    return tensor.data


def _check_datatype(spec: TensorSpec, tensor: OipTensor) -> None:
    expected = None if spec.dtype is None else _SPEC_DATATYPES.get(spec.dtype)
    given = "FP32" if tensor.datatype == BF16 else tensor.datatype  # it was widened
    if expected is not None and expected != given:
        raise InvalidRequest(f"input '{tensor.name}' has datatype {tensor.datatype}, the method takes {expected}")


def _text(name: str, item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input '{name}' is a text and must be UTF-8: {error}") from None


def _wanted(method: MethodInfo, wanted: Sequence[str] | None) -> Sequence[int]:
    """Indices of the outputs to return."""
    if not wanted:
        return range(len(method.outputs))
    index = {spec.name: at for at, spec in enumerate(method.outputs)}
    try:
        return [index[name] for name in wanted]
    except KeyError as unknown:
        raise InvalidRequest(
            f"unexpected output {unknown}, method '{method.name}' of servable '{method.servable}' gives: "
            f"{', '.join(index)}"
        ) from None


def _stack(name: str, values: list[Value]) -> OipTensor:
    """One output of all instances as one tensor."""
    forms = [_form(value) for value in values]
    for index, form in enumerate(forms):
        if form != forms[0]:
            raise InvalidRequest(
                f"output '{name}' differs among the instances of this request: {_named(forms[0])} at instance 0, "
                f"{_named(form)} at instance {index}; the protocol answers with one tensor per output, so send such "
                "instances in requests of their own"
            )
    kind, shape = forms[0]
    if kind == "BYTES":
        items = [_raw(item) for value in values for item in (value.items if isinstance(value, Texts) else [value])]
        return OipTensor(name, kind, (len(values), *shape), items)
    arrays: list[Array] = [np.asarray(value) for value in values]
    return _tensor(name, arrays[0][np.newaxis, ...] if len(arrays) == 1 else np.stack(arrays))


def _form(value: Value) -> tuple[str, tuple[int, ...]]:
    """The type and the dimensions of one instance's output."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape
    return "BYTES", value.shape if isinstance(value, Texts) else ()


def _named(form: tuple[str, tuple[int, ...]]) -> str:
    kind, shape = form
    return f"{kind} {list(shape)}"


def _raw(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)


def _tensor(name: str, array: Array) -> OipTensor:
    return OipTensor(name, NUMPY_DATATYPES[array.dtype], array.shape, array)
