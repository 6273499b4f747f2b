"""MindIR files: converted to ONNX in memory and run by ONNX Runtime.

This needs no MindSpore. Graphs that the converter refuses (control flow, recurrent cells, rare primitives) run on
MindSpore itself where it is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from inflight.errors import StartError
from inflight.mindir import (
    ConversionRefused,
    ConvertedGraph,
    MindIR,
    Parts,
    collectives_in,
    convert,
    convert_parts,
    read_mindir,
)
from inflight.runtime.base import Exchanges, LoadedModel, LoadRequest, Runtime
from inflight.runtime.mindspore import MindSporeRuntime, is_installed, refuse_collectives
from inflight.runtime.onnx import OnnxModel, OnnxRuntime
from inflight.runtime.parts import PartsModel
from inflight.runtime.support import require_files

_log = logging.getLogger("inflight.runtime")

_INLINE_LIMIT = 1 << 29
"""Bytes of weights up to which a model is handed over in memory: a protobuf is limited to 2 GB, and is copied."""


class MindIRRuntime(Runtime):
    """`.mindir` files of MindSpore 2.x, plain or encrypted, with weights inside or beside them."""

    formats: ClassVar[tuple[str, ...]] = ("mindir", "mindir_lite", "mindir_opt")
    suffixes: ClassVar[tuple[str, ...]] = (".mindir",)

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        usable = {*OnnxRuntime.devices(), *(MindSporeRuntime.devices() if is_installed() else ())}
        return tuple(name for name in ("ascend", "gpu", "cpu") if name in usable)

    @classmethod
    def load(cls, request: LoadRequest) -> LoadedModel:
        files = require_files(request)
        if request.config_file is not None:
            _log.warning("The config_file '%s' is for MindSpore's own back ends, it is left out", request.config_file)
        models = [read_mindir(file, request.dec_key, request.dec_mode) for file in files]
        if request.exchanges is not None and any(collectives_in(model) for model in models):
            return _load_parts(files, models, request, request.exchanges)
        for file, model in zip(files, models, strict=True):
            refuse_collectives(file, model)
        device = request.device_type
        if is_installed() and device is not None and device not in OnnxRuntime.devices():
            return MindSporeRuntime.load(request)
        try:
            return _load_converted(files, models, request)
        except ConversionRefused as refused:
            if not is_installed():
                raise StartError(
                    f"Load model failed, {refused}. Run it on MindSpore itself: pip install "
                    "'inflight-serving[mindspore]' (Python 3.10 to 3.12)"
                ) from refused
            _log.warning("%s; MindSpore runs the model", refused)
        return MindSporeRuntime.load(request)


def _load_converted(files: Sequence[Path], models: Sequence[MindIR], request: LoadRequest) -> LoadedModel:
    """Raises ConversionRefused where a file cannot be converted, or ONNX Runtime cannot run the result."""
    graphs: list[ConvertedGraph] = []
    for file, model in zip(files, models, strict=True):
        try:
            graphs.append(convert(model))
        except ConversionRefused as refused:
            raise ConversionRefused(f"'{file.name}' cannot be converted to ONNX: {refused}") from refused
    with TemporaryDirectory(prefix="inflight-mindir-") as folder:
        sources = [_hand_over(graph, Path(folder), f"graph_{index}") for index, graph in enumerate(graphs)]
        # Without models, this checks the device only: a missing device is not the file's fault.
        OnnxModel.from_bytes((), request)
        try:
            return OnnxModel.from_bytes(sources, request)
        except (StartError, MemoryError, ValueError) as failure:
            # MemoryError and ValueError: sizes in the file that exceed any machine's memory.
            names = ", ".join(f"'{file.name}'" for file in files)
            raise ConversionRefused(f"{names} was converted, but does not run: {failure}") from failure


def _load_parts(
    files: Sequence[Path], models: Sequence[MindIR], request: LoadRequest, join: Callable[[], Exchanges]
) -> LoadedModel:
    """A rank's files, which exchange tensors with other ranks."""
    graphs: list[Parts] = []
    for file, model in zip(files, models, strict=True):
        try:
            graphs.append(convert_parts(model))
        except ConversionRefused as refused:
            # MindSpore itself would need a scheduler and ranks of its own.
            raise StartError(f"Load model failed, '{file.name}' cannot be converted to ONNX: {refused}") from refused
    with TemporaryDirectory(prefix="inflight-mindir-") as folder:
        return PartsModel(graphs, request, join(), lambda graph, stem: _hand_over(graph, Path(folder), stem))


def _hand_over(graph: ConvertedGraph, folder: Path, stem: str) -> bytes | str:
    """The model in memory, or the path of one in two files; ONNX Runtime has read both when the session exists."""
    return graph.to_bytes() if graph.weight_bytes <= _INLINE_LIMIT else str(graph.save(folder, stem))
