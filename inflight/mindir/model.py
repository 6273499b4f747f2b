"""A MindIR file as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inflight.errors import StartError


class ConversionRefused(StartError):
    """The file is sound, and holds something that cannot be converted to ONNX."""


@dataclass(frozen=True)
class TensorType:
    """What the exporter inferred of one value.

    Attributes:
        dtype: numpy name; bfloat16 reads as `float32`. None: unknown.
        shape: -1 where a size is open, None where the rank is. `(0,)` stands for a Python scalar too.
    """

    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Opaque:
    """A value that carries no data here: a monad (`what` is None), a function, a dictionary, an unread type."""

    what: str | None


MONAD = Opaque(None)


@dataclass(frozen=True)
class Node:
    """One call of a primitive; `result` is a TensorType, a tuple of results, or None where nothing is known."""

    name: str
    primitive: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Port:
    """An input of the graph; the name is the exporter's full one."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class MindIR:
    """The main graph.

    Attributes:
        version: of the exporting MindSpore, or an empty text.
        values: parameters (arrays) and constants (arrays, Python scalars, texts, None, Opaque, tuples) by name.
        nodes: by name of their one output.
        outputs: names, and the types that the exporter declared.
        functions: names of sub-graphs.
        calls: names of sub-graphs that the main graph calls.
        primitives: every primitive name in the file, sub-graphs included, in the file's order.
    """

    version: str
    inputs: tuple[Port, ...]
    values: dict[str, Any]
    nodes: dict[str, Node]
    outputs: tuple[tuple[str, Any], ...]
    functions: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    primitives: tuple[str, ...] = field(default=())


# MindIR's numbers of element types. numpy has no bfloat16: its values are widened, which loses nothing.
DTYPES: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "float32",
    17: "float64",
}
BFLOAT16 = 16
