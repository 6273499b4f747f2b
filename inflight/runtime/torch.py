"""PyTorch: TorchScript files and exported programs (`torch.export`, `.pt2`).

A TorchScript file has the names of its inputs, not their dtypes and shapes; an exported program has all of them. A
file's kind is recognised by its content, so both may have any of the endings.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from inflight.contract import DTYPE_CODES, Array, GraphSpec, TensorSpec
from inflight.errors import StartError
from inflight.runtime.base import LoadedModel, LoadRequest, Runtime
from inflight.runtime.support import refuse_config_file, require_files, zero_batch

_DTYPES: dict[Any, str] = {getattr(torch, name): name for name in DTYPE_CODES}
_DEVICES = {"cpu": "cpu", "gpu": "cuda", "ascend": "npu"}

# Raised by the loaders for files that are damaged or were written by another version.
_LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AssertionError,
    OSError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)

_Leaves = Callable[[Sequence[Any]], Any]
_Trial = Callable[[], AbstractContextManager[None]]


class TorchModel(LoadedModel):
    """One module for each sub-graph. Outputs in tuples, lists and dicts come out in their own order."""

    def __init__(self, modules: Sequence[_Leaves], graphs: Sequence[GraphSpec], device_type: str, device: Any) -> None:
        self._modules = tuple(modules)
        self.graphs = tuple(graphs)
        self.device_type = device_type
        self._device = None if device_type == "cpu" else device

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        expected = self.graphs[subgraph].inputs
        if len(inputs) != len(expected):
            raise ValueError(f"The model takes {len(expected)} inputs, not {len(inputs)}")
        with torch.inference_mode():
            # Copies, because a module may work in place, and the arrays belong to the caller.
            tensors = [torch.from_numpy(array.copy()) for array in inputs]
            if self._device is not None:
                tensors = [tensor.to(self._device) for tensor in tensors]
            result = self._modules[subgraph](tensors)
            if isinstance(result, torch.Tensor):
                return [_to_array("output", result)]
            return [_to_array(name, value) for name, value in _leaves(result)]

    def close(self) -> None:
        self._modules = ()
        if self.device_type == "gpu":
            torch.cuda.empty_cache()


class TorchRuntime(Runtime):
    """TorchScript and `torch.export` files, on the CPU, on CUDA or ROCm, and on Ascend through torch_npu."""

    formats: ClassVar[tuple[str, ...]] = ("torch", "torchscript", "pt2")
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".ts", ".jit", ".torchscript", ".pt2")

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        types = (("ascend", _has_npu()), ("gpu", torch.cuda.is_available()), ("cpu", True))
        return tuple(name for name, here in types if here)

    @classmethod
    def load(cls, request: LoadRequest) -> TorchModel:
        refuse_config_file(request, "torch")
        files = require_files(request)
        device_type = request.device_type or cls.devices()[0]
        if device_type not in cls.devices():
            raise StartError(
                f"PyTorch cannot use device type '{device_type}' here; use one of: {', '.join(cls.devices())}, or "
                "install a build of torch for that device"
            )
        # One setting for the process, and a process is one replica.
        torch.set_num_threads(max(1, request.threads))
        device = torch.device("cpu") if device_type == "cpu" else torch.device(_DEVICES[device_type], request.device_id)
        modules: list[_Leaves] = []
        graphs: list[GraphSpec] = []
        for file in files:
            module, graph = _load_file(file, device, request.trial)
            modules.append(module)
            graphs.append(graph)
        return TorchModel(modules, graphs, device_type, device)


def _has_npu() -> bool:
    if find_spec("torch_npu") is None:
        return False
    import_module("torch_npu")  # adds torch.npu
    return bool(torch.npu.is_available())


def _load_file(file: Path, device: Any, trial: _Trial | None) -> tuple[_Leaves, GraphSpec]:
    exported = _is_exported(file)
    try:
        # torch's warnings, of TorchScript's end for instance, are meant for a model's author, not for its server.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _load_exported(file, device, trial) if exported else _load_script(file, device)
    except StartError:
        raise
    except _LOAD_ERRORS as failure:
        raise StartError(f"Load model failed, PyTorch cannot load '{file}': {failure}") from failure


def _is_exported(file: Path) -> bool:
    """Whether the file holds an exported program; if not, a TorchScript module.

    Raises:
        StartError: it is neither.
    """
    advice = "save the model with torch.jit.save or torch.export.save"
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as failure:  # zipfile raises half a dozen kinds for a damaged archive
        raise StartError(f"Load model failed, '{file}' is not a model file of PyTorch; {advice}") from failure
    if names & {"archive_format", "serialized_exported_program.json"}:
        return True
    if "constants.pkl" in names:
        return False
    if "data.pkl" in names:
        # torch.save writes weights, or a pickle that runs code when it is opened.
        raise StartError(
            f"Load model failed, '{file}' was written by torch.save and holds weights or pickled objects, not a "
            f"program that can run without its source; {advice}"
        )
    raise StartError(f"Load model failed, '{file}' is not a model file of PyTorch; {advice}")


def _load_script(file: Path, device: Any) -> tuple[_Leaves, GraphSpec]:
    module = torch.jit.load(str(file), map_location=device).eval()
    schema = module.forward.schema
    inputs = []
    for argument in schema.arguments[1:]:  # the first is self
        if argument.has_default_value():
            continue
        if argument.type.kind() != "TensorType":
            raise StartError(
                f"Load model failed, input '{argument.name}' of '{file}' is of type {argument.type}, only tensors "
                "can be served; wrap the model in a module whose forward takes tensors"
            )
        inputs.append(TensorSpec(argument.name))
    forward = module.forward
    return (lambda tensors: forward(*tensors)), GraphSpec(tuple(inputs), _script_outputs(schema.returns[0].type))


def _script_outputs(declared: Any) -> tuple[TensorSpec, ...]:
    """One spec for each declared output; none where only a run shows how many there are (lists, dicts)."""
    if declared.kind() == "TensorType":
        return (TensorSpec("output"),)
    if declared.kind() == "TupleType" and all(item.kind() == "TensorType" for item in declared.elements()):
        return tuple(TensorSpec(f"output_{number}") for number in range(len(declared.elements())))
    return ()


def _load_exported(file: Path, device: Any, trial: _Trial | None) -> tuple[_Leaves, GraphSpec]:
    # From an open file: a path has to end in .pt2.
    with file.open("rb") as stream:
        program = torch.export.load(stream)
    if device.type != "cpu":
        # Here, because torch.export takes longer to import than a TorchScript file to load.
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    graph = _exported_graph(program, file)
    module, structure = program.module(), program.call_spec.in_spec

    def call(tensors: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(list(tensors), structure)
        return module(*args, **kwargs)

    if trial is not None:
        with trial():
            _warm_up(call, graph, program.example_inputs, device)
    return call, graph


def _exported_graph(program: Any, file: Path) -> GraphSpec:
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op != "output"}
    signature = program.graph_signature
    inputs = [_exported_spec(str(name), nodes.get(name), "input", file) for name in signature.user_inputs]
    # The structure of the result with the graph's own names as leaves gives each output a name the author chose.
    structure = pytree.tree_unflatten(list(signature.user_outputs), program.call_spec.out_spec)
    outputs = [_exported_spec(label, nodes.get(name), "output", file) for label, name in _leaves(structure)]
    return GraphSpec(tuple(inputs), tuple(outputs))


def _exported_spec(name: str, value: Any, role: str, file: Path) -> TensorSpec:
    dtype = _DTYPES.get(getattr(value, "dtype", None))
    if dtype is None:
        kind = getattr(value, "dtype", "no tensor")
        raise StartError(
            f"Load model failed, {role} '{name}' of '{file}' is {kind}, which cannot be served; export the model "
            f"with tensors of: {', '.join(DTYPE_CODES)}"
        )
    return TensorSpec(name, dtype, tuple(size if isinstance(size, int) else -1 for size in value.shape))


def _warm_up(call: _Leaves, graph: GraphSpec, example: Any, device: Any) -> None:
    """Runs the example that the program was exported with, else a batch of zeros where all sizes are known."""
    if example is not None:
        tensors = [tensor.to(device) for tensor in pytree.tree_leaves(example)]
    else:
        batch = zero_batch(graph)
        if batch is None:
            return
        tensors = [torch.from_numpy(array).to(device) for array in batch]
    with torch.inference_mode():
        call(tensors)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of a result with their names: keys of dicts, `output_<n>` in tuples, `output` alone."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name or 'output'}_{number}")
    else:
        yield name or "output", value


def _to_array(name: str, value: Any) -> Array:
    dtype = getattr(value, "dtype", None)
    if dtype not in _DTYPES:
        raise TypeError(
            f"'{name}' of the model is {dtype or type(value).__name__}, which cannot be served; return tensors of: "
            f"{', '.join(DTYPE_CODES)}"
        )
    # A copy, because the tensor may be a view of a weight or of an input.
    return np.array(value.numpy(force=True), order="C")
