"""MindSpore itself, for graphs that cannot be converted to ONNX: in this process, with all calls on one thread.

MindSpore is not thread-safe (a shared cell crashes, separate ones hang), so one thread imports it, loads and runs
everything. Its import and its kernels need precautions, each measured and noted where it is taken.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import google.protobuf.message  # noqa: F401 - before MindSpore, which would switch protobuf to its slow Python form

from inflight.contract import Array, GraphSpec
from inflight.errors import StartError
from inflight.mindir import MindIR, collectives_in, read_mindir, read_signature
from inflight.runtime.base import LoadedModel, LoadRequest, Runtime
from inflight.runtime.support import has_ascend, present_devices, require_files, zero_batch

_log = logging.getLogger("inflight.runtime")

_TARGETS = {"cpu": "CPU", "gpu": "GPU", "ascend": "Ascend"}
_ISA_AVX2 = 0x7  # dnnl_cpu_isa_avx2
_INHERITED = ("LD_LIBRARY_PATH", "HCCL_CONNECT_TIMEOUT")

# The device that this process uses, written once by the thread: MindSpore knows one for each process.
_chosen_device: list[tuple[str, int]] = []


def is_installed() -> bool:
    """Whether MindSpore is installed, without importing it (2.5 s, 400 MB)."""
    return find_spec("mindspore") is not None


class MindSporeRuntime(Runtime):
    """`.mindir` files on MindSpore itself."""

    formats: ClassVar[tuple[str, ...]] = ("mindspore",)
    suffixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        return present_devices()

    @classmethod
    def load(cls, request: LoadRequest) -> LoadedModel:
        files = require_files(request)
        if not is_installed():
            raise StartError(
                "Load model failed, MindSpore is not installed: pip install 'inflight-serving[mindspore]' "
                "(Python 3.10 to 3.12)"
            )
        graphs: list[GraphSpec] = []
        for file in files:
            model = read_mindir(file, request.dec_key, request.dec_mode)
            refuse_collectives(file, model)
            graphs.append(read_signature(model))
        loaded = MindSporeModel(files, graphs, request)
        if request.trial is not None:
            with request.trial():
                loaded.warm_up()
        return loaded


def refuse_collectives(file: Path, model: MindIR) -> None:
    """Raises StartError for a shard of a distributed model: loading it without its group is a segmentation fault."""
    names = collectives_in(model)
    if names:
        raise StartError(
            f"Load model failed, '{file.name}' is one shard of a distributed model, it exchanges data with other "
            f"processes ({', '.join(names)}): export the whole model from one process"
        )


class MindSporeModel(LoadedModel):
    """One GraphCell for each sub-graph."""

    def __init__(self, files: Sequence[Path], graphs: Sequence[GraphSpec], request: LoadRequest) -> None:
        self.graphs = tuple(graphs)
        self.device_type = request.device_type or ("ascend" if has_ascend() else "cpu")
        self._files = tuple(files)
        self._request = request
        self._cells: list[Any] = [None] * len(self._files)
        _thread().submit(self._start).result()

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        expected = len(self.graphs[subgraph].inputs)
        if len(inputs) != expected:
            raise ValueError(f"The model takes {expected} inputs, not {len(inputs)}")
        return _thread().submit(self._call, inputs, subgraph).result()

    def warm_up(self) -> None:
        for index, graph in enumerate(self.graphs):
            batch = zero_batch(graph)
            if batch is not None:
                try:
                    self.run(batch, index)
                except RuntimeError as failure:
                    _log.warning("The model was not warmed up, it does not run on one row of zeros: %s", failure)

    def close(self) -> None:
        _thread().submit(self._drop).result()

    def _start(self) -> None:
        """Loads every file once, so that a bad one is known before the first request. In the thread."""
        _configure(self.device_type, self._request.device_id, self._request.threads)
        for index in range(len(self._files)):
            self._cell(index)

    def _cell(self, index: int) -> Any:
        if self._cells[index] is None:
            self._cells[index] = self._load(index)
        return self._cells[index]

    def _load(self, index: int) -> Any:
        mindspore = _mindspore()
        # Cells hold each other in circles: 20 reloads without this grew a process by 530 MB.
        gc.collect()
        options: dict[str, Any] = {}
        if self._request.dec_key is not None:
            options = {"dec_key": self._request.dec_key, "dec_mode": self._request.dec_mode}
        try:
            cell = mindspore.nn.GraphCell(mindspore.load(str(self._files[index]), **options))
            shapes = [spec.shape for spec in self.graphs[index].inputs]
            if any(shape is not None and -1 in shape for shape in shapes):
                # Without it every new shape is compiled anew: 80 to 370 ms, and memory that only grows.
                cell.set_inputs(*self._placeholders(mindspore, index))
        except (RuntimeError, ValueError, TypeError) as failure:
            raise StartError(
                f"Load model failed, MindSpore cannot load '{self._files[index].name}': {_first_line(failure)}"
            ) from failure
        return cell

    def _placeholders(self, mindspore: Any, index: int) -> list[Any]:
        return [
            mindspore.Tensor(
                shape=[None if size == -1 else size for size in spec.shape or ()],
                dtype=getattr(mindspore, "bool_" if spec.dtype == "bool" else spec.dtype or "float32"),
            )
            for spec in self.graphs[index].inputs
        ]

    def _call(self, inputs: Sequence[Array], index: int) -> list[Array]:
        """One run; in the thread."""
        mindspore = _mindspore()
        cell = self._cell(index)
        # A cell that failed once always fails, so it is kept only after a success; the next call loads a new one.
        self._cells[index] = None
        try:
            # Tensor copies: the inputs may be read-only views of a request, and an output may be an input.
            results = cell(*[mindspore.Tensor(array) for array in inputs])
            items = results if isinstance(results, (tuple, list)) else (results,)
            arrays = [item.asnumpy() for item in items]
        except (RuntimeError, ValueError, TypeError, IndexError) as failure:
            raise RuntimeError(f"MindSpore failed: {_first_line(failure)}") from None
        self._cells[index] = cell
        return arrays

    def _drop(self) -> None:
        self._cells = [None] * len(self._files)
        gc.collect()


@cache
def _thread() -> ThreadPoolExecutor:
    """The one thread that touches MindSpore."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="mindspore")


@cache
def _mindspore() -> Any:
    """MindSpore, imported with precautions. In the thread."""
    os.environ.setdefault("GLOG_v", "3")  # errors only
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "upb")
    spec = find_spec("mindspore")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    library = next((path for folder in folders if (path := Path(folder) / "lib" / "libdnnl.so.3").exists()), None)
    if library is None:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    before = {**os.environ}
    module = import_module("mindspore")
    for name in _INHERITED:
        # The import changes these variables; processes that are started later must not inherit the change.
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)
    if library is not None:
        _cap_instructions(library)
    return module


def _cap_instructions(library: Path) -> None:
    """Keeps MindSpore's oneDNN 3 to AVX2: with AVX-512 its convolutions fall to code 100 times slower.

    Only its own copy: the environment variable would slow torch down in this process too.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    try:
        ctypes.CDLL(str(library)).dnnl_set_max_cpu_isa(_ISA_AVX2)
    except (OSError, AttributeError) as failure:
        _log.warning("Cannot limit MindSpore's instruction set, convolutions may be slow: %s", failure)


def _configure(device_type: str, device_id: int, threads: int) -> None:
    """Chooses device and number of threads, before MindSpore is used first. In the thread."""
    device = (device_type, device_id)
    if _chosen_device == [device]:
        return
    for chosen in _chosen_device:
        raise StartError(
            f"Load model failed, MindSpore already uses device {chosen[0]} {chosen[1]} in this process: put models for "
            f"{device_type} {device_id} into a servable of their own"
        )
    mindspore = _mindspore()
    target = _TARGETS[device_type]
    try:
        if hasattr(mindspore, "set_device"):
            mindspore.set_device(target, device_id)
        else:
            mindspore.set_context(device_target=target, device_id=device_id)
        if device_type == "cpu" and hasattr(mindspore, "device_context"):
            mindspore.device_context.cpu.op_tuning.threads_num(max(1, threads))
            mindspore.runtime.dispatch_threads_num(max(1, threads))
    except (RuntimeError, ValueError, TypeError) as failure:
        raise StartError(
            f"Load model failed, MindSpore cannot use device {target} {device_id}: {_first_line(failure)}"
        ) from failure
    _chosen_device.append(device)


def _first_line(failure: BaseException) -> str:
    """MindSpore appends pages of C++ call stacks to its messages."""
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
