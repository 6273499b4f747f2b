"""Inputs and outputs of a MindIR file, without converting it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from inflight.contract import GraphSpec, TensorSpec
from inflight.mindir.model import MindIR, TensorType

_FORWARDING = frozenset({"Depend", "Load", "Return"})
_TUPLES = frozenset({"MakeTuple", "MakeList"})


def input_names(full: list[str]) -> list[str]:
    """Names for clients: the part after the last colon, made different where two inputs share it (`x`, `x_1`)."""
    names: list[str] = []
    for item in full:
        base = item.rpartition(":")[2] or "input"
        name, count = base, 0
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def read_signature(model: MindIR) -> GraphSpec:
    """Inputs and outputs as the exporter declared them. Outputs, which the file does not name, are `output_<index>`."""
    names = input_names([port.name for port in model.inputs])
    inputs = tuple(
        TensorSpec(name, port.type.dtype, port.type.shape) for name, port in zip(names, model.inputs, strict=True)
    )
    kinds = [kind for name, declared in model.outputs for kind in _kinds(model, name, declared)]
    return GraphSpec(
        inputs, tuple(TensorSpec(f"output_{index}", kind.dtype, kind.shape) for index, kind in enumerate(kinds))
    )


def _kinds(model: MindIR, name: str, declared: Any) -> Iterator[TensorType]:
    """Types of an output's tensors: those of the node that makes it, else those declared."""
    seen: set[str] = set()
    while name in model.nodes and name not in seen and model.nodes[name].primitive in _FORWARDING:
        seen.add(name)
        name = model.nodes[name].inputs[0] if model.nodes[name].inputs else ""
    node = model.nodes.get(name)
    if node is not None and node.primitive in _TUPLES and name not in seen:
        for item in node.inputs:
            yield from _kinds(model, item, None) if item != name else ()
    elif isinstance(model.values.get(name), np.ndarray):
        array = model.values[name]
        yield TensorType(array.dtype.name, array.shape)
    else:
        yield from _leaves(declared if node is None or declared is not None else node.result)


def _leaves(kind: Any) -> Iterator[TensorType]:
    if isinstance(kind, tuple):
        for item in kind:
            yield from _leaves(item)
    else:
        yield kind if isinstance(kind, TensorType) else TensorType(None, None)
