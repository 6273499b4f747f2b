"""MindIR files: converted to ONNX in memory and run by ONNX Runtime.

MindSpore is not needed for that. What the converter refuses (control flow, recurrent cells, rare primitives) runs on
the real MindSpore where it is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from inflight.errors import StartError
from inflight.mindir import (
    ConversionRefused,
    ConvertedGraph,
    MindIR,
    collectives_in,
    convert,
    read_mindir,
)
from inflight.runtime.base import LoadedModel, LoadRequest, Runtime
from inflight.runtime.mindspore import MindSporeRuntime, is_installed
from inflight.runtime.onnx import OnnxModel, OnnxRuntime
from inflight.runtime.support import require_files

_log = logging.getLogger("inflight.runtime")

_INLINE_LIMIT = 1 << 29
"""Bytes of weights up to which a model is handed over in memory: a protobuf ends at 2 GB, and copies cost memory."""


class MindIRRuntime(Runtime):
    """`.mindir` files of MindSpore 2.x, plain or encrypted, with weights inside or beside them."""

    formats: ClassVar[tuple[str, ...]] = ("mindir", "mindir_lite", "mindir_opt")
    suffixes: ClassVar[tuple[str, ...]] = (".mindir",)

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        found = {*OnnxRuntime.devices(), *(MindSporeRuntime.devices() if is_installed() else ())}
        return tuple(name for name in ("ascend", "gpu", "cpu") if name in found)

    @classmethod
    def load(cls, request: LoadRequest) -> LoadedModel:
        files = require_files(request)
        if request.config_file is not None:
            _log.warning("The config_file '%s' is for MindSpore's own back ends, it is left out", request.config_file)
        models = [read_mindir(file, request.dec_key, request.dec_mode) for file in files]
        refuse_collectives(files, models)
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


def refuse_collectives(files: Sequence[Path], models: Sequence[MindIR]) -> None:
    """Raises StartError for a shard of a distributed model: MindSpore would kill the process on loading it."""
    for file, model in zip(files, models, strict=True):
        names = collectives_in(model)
        if names:
            raise StartError(
                f"Load model failed, '{file.name}' is one shard of a distributed model, it exchanges data with other "
                f"processes ({', '.join(names)}): export the whole model from one process"
            )


def _load_converted(files: Sequence[Path], models: Sequence[MindIR], request: LoadRequest) -> LoadedModel:
    """Raises ConversionRefused where a file cannot be converted or ONNX Runtime cannot run what comes out."""
    graphs: list[ConvertedGraph] = []
    for file, model in zip(files, models, strict=True):
        try:
            graphs.append(convert(model))
        except ConversionRefused as refused:
            raise ConversionRefused(f"'{file.name}' cannot be converted to ONNX: {refused}") from refused
    with TemporaryDirectory(prefix="inflight-mindir-") as folder:
        sources = [_hand_over(graph, Path(folder), f"graph_{index}") for index, graph in enumerate(graphs)]
        # The device is looked at first: that it is missing is no fault of the file.
        OnnxModel.from_bytes((), request)
        try:
            return OnnxModel.from_bytes(sources, request)
        except (StartError, MemoryError, ValueError) as failure:
            # The last two: sizes in the file that no machine has room for.
            names = ", ".join(f"'{file.name}'" for file in files)
            raise ConversionRefused(f"{names} was converted, but does not run: {failure}") from failure


def _hand_over(graph: ConvertedGraph, folder: Path, stem: str) -> bytes | str:
    """The model in memory, or the path of one in two files; ONNX Runtime has read both when the session exists."""
    return graph.to_bytes() if graph.weight_bytes <= _INLINE_LIMIT else str(graph.save(folder, stem))
