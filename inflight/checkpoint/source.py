"""Weights by their Hugging Face names, independent of how they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from inflight.checkpoint.files import Slice, Tensor, sliced
from inflight.errors import StartError
from inflight.tensors import Floats, Weight

_ROWS = 1024  # rows that are converted to floats at a time


class Source(ABC):
    """The contract of readers of weights.

    Attributes:
        names: of the stored tensors.
        size: bytes of all of them.
    """

    names: list[str]
    size: int

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether there is a weight of this name."""

    @abstractmethod
    def pieces(self, name: str) -> list[str]:
        """The stored tensors of a weight."""

    @abstractmethod
    def shape(self, name: str) -> list[int] | None:
        """The shape of a weight; None if it is packed, so that only `check` can compare it.

        Raises:
            StartError: it is missing.
        """

    @abstractmethod
    def check(self, name: str, wanted: Sequence[int]) -> None:
        """Raises StartError if a weight is missing or of another shape. Reads nothing."""

    @abstractmethod
    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        """A weight, or a slice of it, as it is stored; if possible a view of the file."""

    @abstractmethod
    def release(self) -> None:
        """Releases the memory of the weights that were read. A view that is used again is read again."""

    def idle(self, name: str) -> bool:
        """Whether a stored tensor has no effect and may stay unused."""
        return False


class Weights:
    """The named weights of a model, read one at a time and on demand; a context manager.

    A quantised weight has the name that the float weight would have.

    Args:
        source: reads them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._used: dict[str, None] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.release()

    def __contains__(self, name: str) -> bool:
        return name in self._source

    @property
    def names(self) -> list[str]:
        """The stored tensors; those of a quantised weight by their own names."""
        return self._source.names

    @property
    def size(self) -> int:
        """Bytes of all of them as they are stored."""
        return self._source.size

    def unused(self) -> list[str]:
        """Tensors that were not read."""
        return [name for name in self.names if name not in self._used and not self._source.idle(name)]

    def shape(self, name: str) -> list[int] | None:
        """The shape of a weight, without reading it; None if its packed form does not give it.

        Raises:
            StartError: it is missing.
        """
        return self._source.shape(name)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises StartError if the tensor is missing or has another shape. Reads nothing. Is called before memory is
        reserved, so that a wrong config reserves none."""
        self._source.check(name, shape)

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        """A weight as it is stored: floats, integers with scales, or blocks. It may be a read-only view of the file,
        whose pages `release` gives back.

        Args:
            shape: of the whole weight, as the config wants it.
            part: a slice of it; one that cuts groups of inputs gives floats.

        Raises:
            StartError: it is missing, broken, of another shape or an unknown form; the text names tensor and file.
        """
        self._used.update(dict.fromkeys(self._source.pieces(name)))
        return self._source.read(name, shape, part)

    def floats(self, name: str) -> Floats:
        """A copy of a whole weight of any shape, as floats.

        Raises:
            StartError: as for `read`, or its shape is not known.
        """
        shape = self.shape(name)
        if shape is None:
            raise StartError(f"tensor '{name}' is packed, where floats belong")
        weight = self.read(name, shape)
        return np.array(weight) if isinstance(weight, np.ndarray) else weight.dequantise()

    def release(self) -> None:
        """Releases the memory of what was read so far. Views stay valid, but using them reads the file again."""
        self._source.release()


def share_of(weight: Weight, part: Slice | None) -> Weight:
    """A slice of a weight. Columns that cut groups or blocks become float32."""
    if part is None:
        return weight
    if isinstance(weight, np.ndarray):
        return sliced(weight, part)
    dim, first, end = part
    if dim == 0:
        return weight.rows(first, end)
    if (first, end) == (0, weight.shape[1]):
        return weight
    values = np.empty((weight.shape[0], end - first), np.float32)
    for row in range(0, len(values), _ROWS):
        values[row : row + _ROWS] = weight.rows(row, row + _ROWS).dequantise()[:, first:end]
    return values


def floats_into(weight: Weight, out: Tensor) -> None:
    """Writes a weight's values as floats into an array of its shape, some rows at a time."""
    if isinstance(weight, np.ndarray):
        np.copyto(out, weight, casting="unsafe")
        return
    for row in range(0, len(out), _ROWS):
        out[row : row + _ROWS] = weight.rows(row, row + _ROWS).dequantise()


class Progress:
    """Reports the share of the bytes that were read. Args: told: called with the share."""

    def __init__(self, told: Callable[[float], None] | None) -> None:
        self._told = told
        self._done = 0
        self.total = 0

    def __call__(self, size: int) -> None:
        self._done += size
        if self._told is not None and self.total:
            self._told(min(1.0, self._done / self.total))
