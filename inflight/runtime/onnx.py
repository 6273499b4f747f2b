"""ONNX Runtime, with every execution provider by name. Dimensions that a file leaves open are -1 in the specs.

Options of the device info:

- `provider`: an execution provider of ONNX Runtime, in any case, with or without its suffix `ExecutionProvider`
  (`cuda`, `TensorRT`, `OpenVINOExecutionProvider`, ...). Without it the device type decides.
- every other option goes to the provider under its own name. Options that only MindSpore knows are left out,
  so that a configuration written for it still works.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from inflight.contract import Array, GraphSpec, TensorSpec
from inflight.errors import StartError
from inflight.runtime.base import LoadedModel, LoadRequest, Runtime
from inflight.runtime.support import (
    has_amd,
    has_ascend,
    has_nvidia,
    is_static,
    refuse_config_file,
    require_files,
    zero_batch,
)

_log = logging.getLogger("inflight.runtime")

_SUFFIX = "ExecutionProvider"
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_CANN = "CANNExecutionProvider"
_AMD = ("ROCMExecutionProvider", "MIGraphXExecutionProvider")
_GPU = frozenset({_CUDA, *_AMD, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"})
# Providers that take the device's index as an option.
_INDEXED = _GPU | {_CANN, "DmlExecutionProvider"}

# Options of MindSpore's device infos that ONNX Runtime does not have; the CANN provider shares two of them.
_MINDSPORE_ONLY = frozenset(
    {
        "insert_op_cfg_path",
        "input_format",
        "input_shape",
        "output_type",
        "precision_mode",
        "op_select_impl_mode",
        "fusion_switch_config_path",
        "buffer_optimize_mode",
    }
)
_CANN_SHARES = frozenset({"precision_mode", "op_select_impl_mode"})

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}

# ONNX Runtime's own errors share no base class below Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        value
        for value in vars(ort_state).values()
        if isinstance(value, type) and issubclass(value, Exception) and value not in (RuntimeError, ValueError)
    ),
)


_QUIET = ort.RunOptions()
_QUIET.log_severity_level = 4  # failures come as exceptions; ONNX Runtime's lines on stderr would repeat them


class _Call(NamedTuple):
    """The arguments of a sub-graph's runs, looked up once."""

    session: Any
    inputs: tuple[str, ...]
    outputs: list[str]


class OnnxModel(LoadedModel):
    """One session for each sub-graph."""

    def __init__(self, sessions: Sequence[Any], graphs: Sequence[GraphSpec], device_type: str) -> None:
        self.graphs = tuple(graphs)
        self.device_type = device_type
        self._calls = tuple(
            _Call(session, tuple(spec.name for spec in graph.inputs), [spec.name for spec in graph.outputs])
            for session, graph in zip(sessions, self.graphs, strict=True)
        )

    @classmethod
    def from_bytes(cls, models: Sequence[bytes | str], request: LoadRequest) -> OnnxModel:
        """Loads serialised models or paths, one sub-graph each, and warms them up.

        Only `device_type`, `device_id`, `threads`, `options` and `trial` of the request are used. A path is read by
        ONNX Runtime itself, which also finds external data beside it.

        Raises:
            StartError: a model cannot be loaded, has a tensor type that cannot be served, or the device is missing.
        """
        device_type, provider = _choose_provider(request)
        options = _provider_options(request, provider)
        sessions = [_open(model, provider, options, request.threads) for model in models]
        graphs = [_read_graph(session, model) for session, model in zip(sessions, models, strict=True)]
        loaded = cls(sessions, graphs, device_type)
        if sessions and request.trial is not None:
            with request.trial():
                for subgraph in range(len(graphs)):
                    loaded._warm_up(subgraph)
        return loaded

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        session, names, outputs = self._calls[subgraph]
        if len(inputs) != len(names):
            raise ValueError(f"The model takes {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        # A plain dict is the fastest public way: an IoBinding costs a quarter more on tiny tensors.
        result: list[Array] = session.run(outputs, dict(zip(names, inputs, strict=True)), _QUIET)
        return result

    def close(self) -> None:
        self._calls = ()

    def _warm_up(self, subgraph: int) -> None:
        graph = self.graphs[subgraph]
        batch = zero_batch(graph)
        if batch is None:
            return
        try:
            self.run(batch, subgraph)
        except _ORT_ERRORS as failure:
            if is_static(graph):
                raise StartError(
                    f"Load model failed, the model does not run on inputs filled with zeros: {failure}"
                ) from failure
            # The model may need more than one row, or sizes that go together; a real batch will show.
            _log.warning("The model was not warmed up, it does not run on one row of zeros: %s", failure)


class OnnxRuntime(Runtime):
    """`.onnx` files, and `.ort` files prepared for ONNX Runtime."""

    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    suffixes: ClassVar[tuple[str, ...]] = (".onnx", ".ort")

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        here = _device_providers()
        return tuple(name for name in ("ascend", "gpu", "cpu") if name in here)

    @classmethod
    def load(cls, request: LoadRequest) -> OnnxModel:
        refuse_config_file(request, "onnx")
        return OnnxModel.from_bytes([str(file) for file in require_files(request)], request)


def _device_providers() -> dict[str, str]:
    """The provider of each device type that this machine and this build of ONNX Runtime both have."""
    available = ort.get_available_providers()
    providers = {"cpu": _CPU}
    if _CANN in available and has_ascend():
        providers["ascend"] = _CANN
    gpu = [name for name in (*((_CUDA,) if has_nvidia() else ()), *(_AMD if has_amd() else ())) if name in available]
    if gpu:
        providers["gpu"] = gpu[0]
    return providers


def _choose_provider(request: LoadRequest) -> tuple[str, str]:
    """Device type and provider for a request."""
    named = request.options.get("provider")
    if named is not None:
        provider = _provider_by_name(named)
        return ("gpu" if provider in _GPU else "ascend" if provider == _CANN else "cpu"), provider
    here = _device_providers()
    device_type = request.device_type or OnnxRuntime.devices()[0]
    if device_type not in here:
        raise StartError(
            f"ONNX Runtime cannot use device type '{device_type}' here; use one of: {', '.join(sorted(here))} (its "
            f"build offers {', '.join(_short(name) for name in ort.get_available_providers())}; another build of "
            "the onnxruntime package may offer more)"
        )
    return device_type, here[device_type]


def _short(provider: str) -> str:
    return provider.removesuffix(_SUFFIX)


def _provider_by_name(name: str) -> str:
    short = name.strip().lower().removesuffix(_SUFFIX.lower())
    available = ort.get_available_providers()
    for provider in available:
        if _short(provider).lower() == short:
            return str(provider)
    known = any(_short(provider).lower() == short for provider in ort.get_all_providers())
    reason = "is not part of the installed build of ONNX Runtime" if known else "is not known to ONNX Runtime"
    raise StartError(
        f"The execution provider '{name}' {reason}; use one of: {', '.join(_short(item) for item in available)}"
    )


def _provider_options(request: LoadRequest, provider: str) -> dict[str, str]:
    left_out = _MINDSPORE_ONLY - (_CANN_SHARES if provider == _CANN else frozenset())
    options = {"device_id": str(request.device_id)} if provider in _INDEXED else {}
    return options | {key: value for key, value in request.options.items() if key != "provider" and key not in left_out}


def _open(model: bytes | str, provider: str, options: dict[str, str], threads: int) -> Any:
    settings = ort.SessionOptions()
    # With one thread ONNX Runtime computes on the caller's thread and starts none.
    settings.intra_op_num_threads = max(1, threads)
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Idle threads that spin take the cores that other replicas compute on.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # errors; they also come as exceptions
    providers = [(provider, options)] + ([(_CPU, {})] if provider != _CPU else [])
    name = model if isinstance(model, str) else "in memory"
    try:
        session = ort.InferenceSession(model, settings, providers=providers, enable_fallback=0)
    except _ORT_ERRORS as failure:
        raise StartError(f"Load model failed, ONNX Runtime cannot open the model '{name}': {failure}") from failure
    # A provider whose libraries are missing is dropped without an error; slow answers would be the only sign.
    if session.get_providers()[0] != provider:
        raise StartError(
            f"Load model failed, ONNX Runtime could not start its provider {_short(provider)} (are the libraries of "
            "the device installed?); use device type 'cpu' to run the model without it"
        )
    return session


def _read_graph(session: Any, model: bytes | str) -> GraphSpec:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    unranked: frozenset[str] = frozenset()
    # ONNX Runtime reports a scalar and a tensor of unknown rank alike; the file distinguishes them.
    if any(not node.shape for node in (*inputs, *outputs)):
        unranked = _unranked_names(model)
    return GraphSpec(
        tuple(_tensor_spec(node, "input", unranked) for node in inputs),
        tuple(_tensor_spec(node, "output", unranked) for node in outputs),
    )


def _unranked_names(model: bytes | str) -> frozenset[str]:
    if isinstance(model, str) and Path(model).suffix.lower() == ".ort":
        return frozenset()
    proto = onnx.load(model, load_external_data=False) if isinstance(model, str) else onnx.load_from_string(model)
    values = (*proto.graph.input, *proto.graph.output)
    # ONNX Runtime drops a declared shape that the graph contradicts.
    return frozenset(
        value.name
        for value in values
        if not value.type.tensor_type.HasField("shape") or value.type.tensor_type.shape.dim
    )


def _tensor_spec(node: Any, role: str, unranked: frozenset[str]) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        hint = (
            "turn text into numbers in a Python stage before the model"
            if node.type == "tensor(string)"
            else f"export the model with a cast, types that can be served: {', '.join(_DTYPES.values())}"
        )
        raise StartError(
            f"Load model failed, {role} '{node.name}' of the model has type {node.type}, which cannot be served; {hint}"
        )
    if node.name in unranked and not node.shape:
        return TensorSpec(node.name, dtype, None)
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, dtype, shape)
