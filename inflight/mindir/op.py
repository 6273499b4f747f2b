"""`Op`, the argument of a mapping: one call of a primitive; and the table of mappings.

Arguments of a primitive are inputs in files of newer MindSpore versions (mostly constants) and attributes in older
ones; the accessors of `Op` look in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np

from inflight.mindir.emitter import Emitter, Shape, Tensor
from inflight.mindir.model import ConversionRefused, Opaque, TensorType

Value: TypeAlias = Any
"""A Tensor, a tuple of values, or a constant: an array, a Python scalar, a text, None, Opaque."""
Mapping: TypeAlias = "Callable[[Op], Value]"

MAPPINGS: dict[str, Mapping] = {}
"""Primitive name to the function that maps it."""

REQUIRED = object()
# MindSpore writes formats and pad modes as texts in attributes and as numbers in inputs.
_PAD_MODES = {0: "PAD", 1: "SAME", 2: "VALID"}
# Largest number of parts, groups or sizes: more than any real model has, while a damaged file may hold any number.
_MAX_COUNT = 1 << 16
_FORMATS = {-1: "NCHW", 0: "NCHW", 1: "NHWC", 15: "NCDHW"}


def maps(*names: str) -> Callable[[Mapping], Mapping]:
    """Registers a function as the mapping of each of these primitives."""

    def enter(function: Mapping) -> Mapping:
        for name in names:
            assert name not in MAPPINGS, name
            MAPPINGS[name] = function
        return function

    return enter


def find_mapping(primitive: str) -> Mapping | None:
    """The mapping of a primitive. Newer files append `View` to some names; the arguments are the same."""
    return MAPPINGS.get(primitive) or MAPPINGS.get(primitive.removesuffix("View"))


class Op:
    """One call of a primitive.

    Attributes:
        primitive: its name.
        inputs: values, without monads.
        attributes: of the primitive.
        result: a TensorType, a tuple of them, or None, as the exporter inferred.
        graph: the ONNX graph that nodes are added to.
    """

    def __init__(self, primitive: str, inputs: list[Value], attributes: dict[str, Any], result: Any, graph: Emitter):
        self.primitive = primitive
        self.inputs = inputs
        self.attributes = attributes
        self.result = result
        self.graph = graph

    def refuse(self, reason: str) -> NoReturn:
        raise ConversionRefused(f"{self.primitive}: {reason}")

    @property
    def dtype(self) -> str | None:
        """dtype of the first result, where known."""
        first = self._first_result()
        return first.dtype if first is not None else None

    @property
    def shape(self) -> Shape:
        """Shape of the first result, where known."""
        first = self._first_result()
        return first.shape if first is not None else None

    def _first_result(self) -> TensorType | None:
        first = self.result[0] if isinstance(self.result, tuple) and self.result else self.result
        return first if isinstance(first, TensorType) else None

    def value(self, index: int, name: str, default: Value = REQUIRED) -> Value:
        """Input number `index`, else the attribute `name`, else the default."""
        if index < len(self.inputs):
            return self.inputs[index]
        if name in self.attributes:
            return self.attributes[name]
        if default is REQUIRED:
            self.refuse(f"argument '{name}' is missing")
        return default

    def static(self, index: int, name: str, default: Value = REQUIRED) -> Value:
        """As `value`, for arguments that must be constants; arrays become numbers and tuples of numbers."""
        return self._known(self.value(index, name, default), name)

    def _known(self, value: Value, name: str) -> Value:
        if isinstance(value, np.ndarray):
            return _plain(value.tolist())
        if isinstance(value, tuple):
            return tuple(self._known(item, name) for item in value)
        if isinstance(value, (Tensor, Opaque)):
            self.refuse(f"argument '{name}' is computed by the graph, it has to be a constant")
        return value

    def integers(self, index: int, name: str, default: Value = REQUIRED) -> tuple[int, ...]:
        """A known tuple of integers; a single one counts as a tuple of one."""
        value = self.static(index, name, default)
        return tuple(int(item) for item in value) if isinstance(value, tuple) else (int(value),)

    def integer(self, index: int, name: str, default: Value = REQUIRED) -> int:
        values = self.integers(index, name, default)
        if len(values) != 1:
            self.refuse(f"argument '{name}' is {values}, it has to be one number")
        return values[0]

    def number(self, index: int, name: str, default: Value = REQUIRED) -> float:
        value = self.static(index, name, default)
        return float(value[0] if isinstance(value, tuple) else value)

    def flag(self, index: int, name: str, default: bool = False) -> bool:
        value = self.static(index, name, default)
        return bool(value[0] if isinstance(value, tuple) else value)

    def pad_mode(self, index: int, name: str = "pad_mode") -> str:
        """`PAD`, `SAME` or `VALID`."""
        value = self.static(index, name, "VALID")
        mode = _PAD_MODES.get(value, str(value)) if isinstance(value, int) else str(value).upper()
        if mode not in _PAD_MODES.values():
            self.refuse(f"pad mode '{mode}' is unknown")
        return mode

    def require_channels_first(self, index: int, name: str = "format") -> None:
        value = self.static(index, name, "NCHW")
        text = _FORMATS.get(value, str(value)) if isinstance(value, int) else str(value).upper()
        if text not in ("NCHW", "NCDHW", "DEFAULTFORMAT"):
            self.refuse(f"data format {text} is not supported, only NCHW")

    def tensor(self, index: int, dtype: str | None = None) -> Tensor:
        """An input as a value of the ONNX graph.

        Args:
            dtype: the dtype to cast it to; None: constant scalars become int64, float32 or bool.
        """
        if index >= len(self.inputs):
            self.refuse(f"input {index} is missing")
        return self.to_tensor(self.inputs[index], dtype)

    def optional(self, index: int, dtype: str | None = None) -> Tensor | None:
        """As `tensor`; None where the input is missing or None."""
        if index >= len(self.inputs) or self.inputs[index] is None:
            return None
        return self.tensor(index, dtype)

    def to_tensor(self, value: Value, dtype: str | None = None) -> Tensor:
        if isinstance(value, Tensor):
            return self.graph.cast(value, dtype) if dtype else value
        if isinstance(value, (bool, int, float, np.ndarray)):
            return self.graph.constant(value, dtype or _scalar_dtype(value))
        if isinstance(value, tuple):
            return self._vector(value, dtype or "int64")
        return self.refuse(f"an input is {_describe(value)}, it has to be a tensor")

    def _vector(self, items: tuple[Value, ...], dtype: str) -> Tensor:
        if not any(isinstance(item, Tensor) for item in items):
            return self.graph.constant(self._known(items, "input"), dtype)
        length = self.graph.constant([1], "int64")
        parts = [self.graph.node("Reshape", self.to_tensor(item, dtype), length, shape=(1,)) for item in items]
        return self.graph.node("Concat", *parts, axis=0, shape=(len(parts),))

    def tensors(self) -> list[Tensor]:
        """The tensors of an op that takes a tuple of them, or several inputs."""
        first = self.inputs[0] if self.inputs else ()
        items: Sequence[Value] = first if isinstance(first, tuple) else self.inputs
        return [self.to_tensor(item) for item in items]

    def count(self, value: int, name: str, maximum: int = _MAX_COUNT) -> int:
        """Checks a number of parts that the converter creates nodes for."""
        if not 0 < value <= maximum:
            self.refuse(f"'{name}' is {value}, it has to be from 1 to {maximum}")
        return value

    def axis(self, value: int, rank: int) -> int:
        if not -rank <= value < rank:
            self.refuse(f"axis {value} is outside of {rank} dimensions")
        return value % rank


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, list) else value


def _scalar_dtype(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return str(value.dtype.name)
    return "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float32"


def _describe(value: Value) -> str:
    if isinstance(value, Opaque):
        return value.what or "a side effect"
    return "None" if value is None else f"a value of type {type(value).__name__}"
