"""The part of MindSpore's interface that Inflight uses, with its measured vices.

- Calls from two threads kill the process: here they raise AssertionError.
- A cell that failed at run time fails for ever, with another message.
- A shape that was not announced by `set_inputs` is compiled: `compiled` counts it.
- The import changes the environment.

A file computes the sum of its inputs, whatever it says. An input without elements is the failure at run time.
"""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from inflight.mindir.crypto import encryption_mode

os.environ["LD_LIBRARY_PATH"] = "/fake/mindspore/plugin"
os.environ["HCCL_CONNECT_TIMEOUT"] = "600"

log: list[tuple[str, Any]] = []
threads: set[int] = set()
environment = dict(os.environ)
bool_, int32, int64, float16, float32 = "bool_", "int32", "int64", "float16", "float32"
_TRAILER = (
    "\n\n----------------\n- C++ Call Stack: (For framework developers)\n----------------\nmindspore/ccsrc/x.cc:1 F"
)


def _note(name: str, value: Any = None) -> None:
    threads.add(threading.get_ident())
    assert len(threads) == 1, "MindSpore was called from two threads"
    log.append((name, value))


class Tensor:
    def __init__(self, data: Any = None, shape: Any = None, dtype: Any = None) -> None:
        _note("Tensor", shape)
        self._data = None if data is None else np.array(data)
        self.shape = shape if data is None else self._data.shape
        self.dtype = dtype

    def asnumpy(self) -> np.ndarray:
        _note("asnumpy")
        assert self._data is not None
        return self._data


def load(file_name: str, **options: Any) -> Any:
    _note("load", (file_name, options))
    with open(file_name, "rb") as file:
        mode = encryption_mode(file.read(4))
    if (mode is None) != ("dec_key" not in options) or mode != options.get("dec_mode", mode):
        raise RuntimeError("Load MindIR failed" + _TRAILER)
    return SimpleNamespace(file=file_name)


class _GraphCell:
    def __init__(self, graph: Any) -> None:
        _note("GraphCell", graph.file)
        self.poisoned = False
        self.dynamic = False
        self.shapes: set[Any] = set()

    def set_inputs(self, *inputs: Tensor) -> None:
        _note("set_inputs", [(list(item.shape), item.dtype) for item in inputs])
        self.dynamic = True

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = tuple(item.shape for item in inputs)
        if not self.dynamic and shapes not in self.shapes:
            _note("compile", shapes)
        self.shapes.add(shapes)
        if self.poisoned:
            raise RuntimeError("An error occurred in the previous step of this model execution." + _TRAILER)
        arrays = [item.asnumpy() for item in inputs]
        if any(array.size == 0 for array in arrays):
            self.poisoned = True
            raise ValueError("For 'MaxPool', the input has no elements." + _TRAILER)
        total = Tensor(sum(arrays[1:], arrays[0]))
        return total if len(inputs) == 1 else (total, Tensor(arrays[0]))


nn = SimpleNamespace(GraphCell=_GraphCell)


def set_device(device_target: str, device_id: int = 0) -> None:
    if device_target != "CPU":
        raise RuntimeError(f"Unsupported device target {device_target}" + _TRAILER)
    _note("set_device", (device_target, device_id))


device_context = SimpleNamespace(
    cpu=SimpleNamespace(op_tuning=SimpleNamespace(threads_num=lambda count: _note("threads_num", count)))
)
runtime = SimpleNamespace(dispatch_threads_num=lambda count: _note("dispatch_threads_num", count))
