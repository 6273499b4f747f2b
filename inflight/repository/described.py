"""Reads what Triton's config.pbtxt says of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inflight.config import DescribedConfig, SequenceConfig, SignalConfig, StateConfig, TensorConfig
from inflight.errors import ConfigError

if TYPE_CHECKING:
    from inflight.proto import open_inference_pb2 as pb

log = logging.getLogger("inflight")

FILE = "config.pbtxt"
MAX_BYTES = 1 << 20
"""Bytes of a description or a file of labels that are read."""
MOST_KNOWN = 1024
"""Descriptions that are kept, so that a request for a model does not parse its file anew."""
_UNKNOWN = re.compile(r'^(?:(\d+):\d+ ?: ?)?.*?has no field named "([^"]*)"', re.DOTALL)


def described(folder: Path) -> DescribedConfig | None:
    """The description in a model's folder; None: there is none.

    Raises:
        ConfigError: it cannot be read, or it describes what this server does not do.
    """
    file = folder / FILE
    known = _known.get(file)
    if known is not None and all(_stamp(each) == stamp for each, stamp in known.stamps.items()):
        return known.says
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"'{file}' has more than {MAX_BYTES} bytes, which is no description of a model")
        stamps = {file: _stamp(file)}
        message = _message(file, file.read_text())
        stamps |= {path: _stamp(path) for each in message.output if (path := folder / each.label_filename) != folder}
        says = _read(file, message)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"'{file}' cannot be read: {error}") from error
    while len(_known) >= MOST_KNOWN:
        _known.pop(next(iter(_known)), None)
    _known[file] = _Known(stamps, says)
    return says


class _Known(NamedTuple):
    """A description that was read. Attributes: stamps: of the files that it was read from, from before."""

    stamps: Mapping[Path, tuple[int, ...] | None]
    says: DescribedConfig


_known: dict[Path, _Known] = {}


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or another one takes its place, with its time too (`cp -p`, archives). None:
    there is no such file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def _message(file: Path, text: str) -> pb.ModelConfig:
    from google.protobuf import text_format  # other models do without

    from inflight.proto.open_inference_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        unknown = _UNKNOWN.match(str(error))
        if unknown is None:
            raise ConfigError(f"'{file}' is not what Triton's config.pbtxt is: {error}") from error
    try:
        message = text_format.Parse(text, ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ConfigError(f"'{file}' is not what Triton's config.pbtxt is: {error}") from error
    _warn(file, unknown[2])
    return message


@lru_cache(maxsize=1024)
def _warn(file: Path, field: str) -> None:
    """Once for a file."""
    log.warning("'%s' has fields that change nothing here, as '%s'", file, field)


def _read(file: Path, message: pb.ModelConfig) -> DescribedConfig:
    from google.protobuf.json_format import MessageToDict

    if message.max_batch_size < 0:
        raise ConfigError(f"'{file}': max_batch_size must be 0 or more")
    if message.model_transaction_policy.decoupled:
        raise ConfigError(f"'{file}': a decoupled model file cannot be; write a servable with a generator of texts")
    batching = message.dynamic_batching
    queue = batching.default_queue_policy
    groups = message.instance_group
    return DescribedConfig(
        max_batch_size=message.max_batch_size,
        inputs=tuple(TensorConfig(each.name, _datatype(file, each), tuple(each.dims)) for each in message.input),
        outputs=tuple(
            TensorConfig(each.name, _datatype(file, each), tuple(each.dims), _labels(file, each.label_filename))
            for each in message.output
        ),
        queue_delay=batching.max_queue_delay_microseconds / 1e6,
        instances=max(1, sum(max(1, group.count) for group in groups)),
        versions=_versions(message.version_policy),
        file=message.default_model_filename,
        queue_size=queue.max_queue_size,
        timeout=queue.default_timeout_microseconds / 1e6,
        priority=batching.default_priority_level,
        sequence=_sequence(file, message) if message.HasField("sequence_batching") else None,
        told=_numbers(message.DESCRIPTOR, MessageToDict(message, preserving_proto_field_name=True)),
    )


def _numbers(form: Any, told: dict[str, Any]) -> dict[str, Any]:
    """The object with numbers where protobuf's JSON has texts for integers of 64 bits: so Triton tells it."""
    found = dict(told)
    for field in form.fields:
        if field.name not in told:
            continue
        value, inner = told[field.name], field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            inner = inner.fields_by_name["value"].message_type
            if inner is not None:
                found[field.name] = {key: _numbers(inner, each) for key, each in value.items()}
        elif inner is not None:
            found[field.name] = (
                [_numbers(inner, each) for each in value] if isinstance(value, list) else _numbers(inner, value)
            )
        elif field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            found[field.name] = [int(each) for each in value] if isinstance(value, list) else int(value)
    return found


def _datatype(file: Path, tensor: Any) -> str:
    from inflight.proto.open_inference_pb2 import DataType

    name = DataType.Name(tensor.data_type).removeprefix("TYPE_")
    if name == "INVALID":
        where = getattr(tensor, "name", None) or getattr(tensor, "input_name", "")
        raise ConfigError(f"'{file}': the data_type of '{where}' is missing; write one like TYPE_FP32")
    return "BYTES" if name == "STRING" else name


def _labels(file: Path, name: str) -> tuple[str, ...]:
    if not name:
        return ()
    place = file.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not place.is_file():
        raise ConfigError(f"'{file}': there is no file '{name}' of labels beside it")
    if place.stat().st_size > MAX_BYTES:
        raise ConfigError(f"'{place}' has more than {MAX_BYTES} bytes, which are no labels")
    return tuple(place.read_text().splitlines())


def _versions(policy: pb.ModelVersionPolicy) -> str:
    kind = policy.WhichOneof("policy_choice")
    if kind == "latest":
        return f"latest:{policy.latest.num_versions or 1}"
    if kind == "specific":
        return ",".join(str(version) for version in policy.specific.versions) or "latest"
    return "all" if kind == "all" else ""


_KINDS = ("start", "ready", "end", "corrid")  # by number


def _sequence(file: Path, message: pb.ModelConfig) -> SequenceConfig:
    batching = message.sequence_batching
    states = tuple(
        StateConfig(each.input_name, each.output_name, _datatype(file, each), tuple(each.dims))
        for each in batching.state
    )
    for state in states:
        if any(dim < 0 for dim in state.dims) or "BYTES" in state.datatype:
            raise ConfigError(
                f"'{file}': the state '{state.input}' must have a fixed shape of numbers, so that it can begin as zeros"
            )
    signals: list[SignalConfig] = []
    for each in batching.control_input:
        for control in each.control:
            kind = _KINDS[control.kind]
            floats = bool(control.fp32_false_true)
            given: Sequence[float] = (
                control.fp32_false_true or control.int32_false_true or control.bool_false_true or (0, 1)
            )
            if len(given) != 2:
                raise ConfigError(f"'{file}': '{each.name}' needs two values, of no and of yes, like [ 0, 1 ]")
            datatype = "FP32" if floats else "BOOL" if control.bool_false_true else "INT32"
            if kind == "corrid":
                datatype = _datatype(file, _Typed(each.name, control.data_type))
            signals.append(SignalConfig(each.name, kind, datatype, (float(given[0]), float(given[1]))))
    idle = batching.max_sequence_idle_microseconds / 1e6
    return SequenceConfig(states, tuple(signals), idle or SequenceConfig().idle)


class _Typed:
    """A name with a type, as `_datatype` reads it."""

    def __init__(self, name: str, data_type: int) -> None:
        self.name = name
        self.data_type = data_type
