"""Values, tensor descriptions and method signatures: the words every package shares.

A *row* holds the inputs or outputs of one instance, by position. An *outcome* is a row or the error that
took its place: one failed instance never fails its neighbours.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np

from inflight.config import DescribedConfig
from inflight.errors import InflightError, InvalidRequest

T = TypeVar("T")
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Texts:
    """Several texts, or several byte strings, as one output of an instance.

    Attributes:
        shape: dimensions, at least one.
        items: in row-major order, all of one kind.
    """

    shape: tuple[int, ...]
    items: list[str] | list[bytes]

    def tolist(self, say: Callable[[Any], Any] = lambda item: item) -> list[Any]:
        """Lists within lists, as many as there are dimensions, of what `say` makes of each item."""
        listed: list[Any] = np.array([*map(say, self.items)], object).reshape(self.shape).tolist()
        return listed


Value: TypeAlias = Array | str | bytes | Texts
"""One input or output of one instance: a C-contiguous array, a text, raw bytes, or several of these two."""
Row: TypeAlias = "Sequence[Value]"
Outcome: TypeAlias = "Row | InflightError"
Result: TypeAlias = "Sequence[Outcome] | InflightError"
"""Of a request: an outcome for each of its rows, in order, or why it was not run as a whole."""
SayTo: TypeAlias = "Callable[[int, str], None]"
"""Called with the index of an instance and the next piece of its text."""

NEWEST = 0
"""The version number that means the newest registered version."""

# The public numbers of MindSpore Serving's `DataType`; the worker channel uses the same ones.
DTYPE_CODES: dict[str, int] = {
    "bool": 1,
    "int8": 2,
    "uint8": 3,
    "int16": 4,
    "uint16": 5,
    "int32": 6,
    "uint32": 7,
    "int64": 8,
    "uint64": 9,
    "float16": 10,
    "float32": 11,
    "float64": 12,
}
STRING_CODE = 13
BYTES_CODE = 14
STRINGS_CODE = 15
"""`Texts` of str, on the worker channel only; those of bytes have the next number."""
DTYPES: dict[int, np.dtype[Any]] = {code: np.dtype(name) for name, code in DTYPE_CODES.items()}
CODES: dict[np.dtype[Any], int] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The description of a tensor: name, type and shape, as far as they are known.

    Attributes:
        name: its name; a model file's own name or a method's parameter name.
        dtype: numpy name (`float32`, ...), `str`, `bytes`, or None where it is not known.
        shape: dimensions, -1 where any size fits, or None where nothing is known. A model's spec includes the
            batch dimension; a method's spec describes one instance and does not.
    """

    name: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Inputs and outputs of one sub-graph, in the model's own order, batch dimension included.

    A dimension of -1 accepts any size. `None` as shape or dtype: not known (callables).
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as a client sees it, with the resolved version (never 0).

    Attributes:
        optional: inputs that a client may leave out, with their default values.
        whole: an instance is one call of a bare model file without a batch dimension. Its tensors have exactly the
            model's dimensions, also in protocols whose tensors otherwise begin with the number of instances.
        stateful: some inputs are what the last request of the same sequence left (`SequenceConfig`).
        dtypes: numpy's dtypes of the inputs with a known numeric type, by name.
        input_names, output_names: those of `inputs` and `outputs`.
    """

    servable: str
    version: int
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: tuple[tuple[str, Value], ...] = ()
    whole: bool = False
    stateful: bool = False
    dtypes: Mapping[str, np.dtype[Any]] = field(init=False, repr=False, compare=False)
    input_names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    output_names: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = {spec.name: np.dtype(spec.dtype) for spec in self.inputs if spec.dtype in DTYPE_CODES}
        object.__setattr__(self, "dtypes", known)
        object.__setattr__(self, "input_names", tuple(spec.name for spec in self.inputs))
        object.__setattr__(self, "output_names", tuple(spec.name for spec in self.outputs))

    def row(self, named: dict[str, Value]) -> list[Value]:
        """The inputs of one instance in the method's order. Unknown names are ignored.

        Raises:
            InvalidRequest: an input of the method is missing.
        """
        return self.pick({**dict(self.optional), **named} if self.optional else named)

    def pick(self, named: Mapping[str, T]) -> list[T]:
        """The entries for the method's inputs, in their order: `row` for entries of any type.

        Raises:
            InvalidRequest: an input of the method is missing.
        """
        try:
            return [named[name] for name in self.input_names]
        except KeyError as missing:
            raise InvalidRequest(
                f"Cannot find input {missing.args[0]} in instance input, method '{self.name}' of servable "
                f"'{self.servable}' takes: {', '.join(spec.name for spec in self.inputs)}"
            ) from None


@dataclass(frozen=True, slots=True)
class TextPart:
    """The next piece of the text that a language model generates for one instance of a request."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ServableStatus:
    """One version of a servable: its methods, and whether it can answer now.

    Attributes:
        methods: empty until it is loaded.
        loaded: it has been ready before; false during its first start.
        described: what its folder says of it (`DescribedConfig`); None: nothing.
    """

    name: str
    version: int
    methods: tuple[MethodInfo, ...]
    ready: bool
    replicas: int
    ready_replicas: int
    loaded: bool = True
    described: DescribedConfig | None = None


class ModelState(enum.Enum):
    """The states of a model in a repository's index; the values are the Open Inference Protocol's words."""

    KNOWN = ""  # it was never loaded
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class KnownModel:
    """One version of a model in a repository's index.

    Attributes:
        version: 0 where none is known, as for a model that was never loaded.
        reason: why it cannot answer, or why its last load failed; empty where there is nothing to say.
    """

    name: str
    version: int
    state: ModelState
    reason: str = ""

    @classmethod
    def of(cls, status: ServableStatus, reason: str = "") -> KnownModel:
        """That of a version that is served, or loads with the server. Args: reason: why its last load failed."""
        if status.ready:
            return cls(status.name, status.version, ModelState.READY, reason)
        if not status.loaded:
            return cls(status.name, status.version, ModelState.LOADING, "it is still being loaded")
        return cls(status.name, status.version, ModelState.UNAVAILABLE, "no replica is ready")
