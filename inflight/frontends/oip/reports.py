"""What the Open Inference Protocol's extensions tell of a model, in Triton's words: its configuration, its statistics.

perf_analyzer and model_analyzer read both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from inflight.contract import MethodInfo
from inflight.frontends.base import Backend
from inflight.frontends.oip.mapping import MAX_INSTANCES, TensorMetadata, find_model, metadata, model_names
from inflight.metrics import Totals

TotalsOf: TypeAlias = "Callable[[str, str], Totals]"
"""What a method has done since the start, by servable and method."""

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "sequence",
    "schedule_policy",
    "model_repository",
    "model_configuration",
    "statistics",
    "parameters",
    "trace",
    "logging",
    "generate",
)
"""The names of the extensions that both transports announce."""

TRACE = {
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
    "trace_file": [""],
    "trace_mode": ["triton"],
}
"""The settings of traces, which this server does not make."""
LOG: dict[str, str | bool | int] = {
    "log_file": "",
    "log_info": False,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
"""The settings of the log, in Triton's words; `--log-level` sets it at the start."""
NO_TRACE = "this server makes no traces; read /metrics and the statistics instead"
NO_LOG = "the log is set when the server starts, with --log-level"
NO_MEMORY = "shared memory between client and server is not supported, send the tensors' bytes in the request"

_TYPES = {"BYTES": "TYPE_STRING", "ANY": "TYPE_INVALID"}


def model_config(backend: Backend, name: str, version: str) -> dict[str, Any]:
    """A model's configuration as the JSON of Triton's `ModelConfig`.

    A method takes any number of instances, which stand in the first dimension: `max_batch_size` is the most that a
    request may carry. A model file without such a dimension has 0 there.

    Raises:
        NotFound, Loading, InvalidRequest: as `find_model`.
    """
    method = find_model(backend, name, version)
    about = metadata(backend, name, version)
    status = next(
        each for each in backend.servables() if (each.name, each.version) == (method.servable, method.version)
    )
    optional = dict(method.optional)
    first = 0 if method.whole else 1
    config: dict[str, Any] = {
        "name": name,
        "platform": about.platform,
        "backend": "inflight",
        "version_policy": {"latest": {"num_versions": max(1, len(about.versions))}},
        "max_batch_size": 0 if method.whole else MAX_INSTANCES,
        "input": [{**_tensor(each, first), "optional": each.name in optional} for each in about.inputs],
        "output": [_tensor(each, first) for each in about.outputs],
        "instance_group": [{"name": name, "kind": "KIND_AUTO", "count": max(1, status.replicas)}],
        "model_transaction_policy": {"decoupled": False},
    }
    if status.described is not None:
        told = status.described.told
        known = {key: value for key, value in told.items() if key not in ("name", "platform", "backend")}
        return {**config, "max_batch_size": 0, **known}
    if not method.whole:
        config["dynamic_batching"] = {"preferred_batch_size": [], "max_queue_delay_microseconds": 0}
    return config


def _tensor(tensor: TensorMetadata, first: int) -> dict[str, Any]:
    kind = _TYPES.get(tensor.datatype, f"TYPE_{tensor.datatype}")
    return {"name": tensor.name, "data_type": kind, "dims": list(tensor.shape[first:])}


def model_statistics(backend: Backend, totals: TotalsOf, name: str, version: str) -> dict[str, Any]:
    """The statistics of one model, or of all for an empty name, as the JSON of Triton's reply. Versions of a model are
    counted together.

    Raises:
        NotFound, Loading, InvalidRequest: as `find_model`.
    """
    names = [name] if name else model_names(backend)
    return {"model_stats": [_statistics(each, find_model(backend, each, version), totals) for each in names]}


def _statistics(name: str, method: MethodInfo, totals_of: TotalsOf) -> dict[str, Any]:
    totals = totals_of(method.servable, method.name)
    queued = totals.queued_seconds / totals.queued if totals.queued else 0.0
    none = _duration(totals.answered, 0.0)
    return {
        "name": name,
        "version": str(method.version),
        "last_inference": int(totals.last * 1000),
        "inference_count": sum(runs.size * runs.times for runs in totals.runs),
        "execution_count": sum(runs.times for runs in totals.runs),
        "inference_stats": {
            "success": _duration(totals.answered, totals.answered_seconds),
            "fail": _duration(totals.failed, totals.failed_seconds),
            "queue": _duration(totals.answered, queued * totals.answered),
            "compute_input": none,
            "compute_infer": _duration(totals.answered, totals.busy_seconds * totals.answered),
            "compute_output": none,
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": runs.size,
                "compute_input": _duration(runs.times, 0.0),
                "compute_infer": _duration(runs.times, runs.seconds),
                "compute_output": _duration(runs.times, 0.0),
            }
            for runs in totals.runs
        ],
        "memory_usage": [],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}
