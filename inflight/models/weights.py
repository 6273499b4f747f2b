"""Checkpoints in Hugging Face layout, read slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from inflight.errors import StartError
from inflight.loading import read_object
from inflight.models.files import GGUF_NAME, Part, TensorFiles
from inflight.models.quantised import QuantisedFiles, scheme_of
from inflight.tensors import Quantised

__all__ = ["Checkpoint", "Part"]


class Source(Protocol):
    """Weights by their Hugging Face names. `read` and `integers` of one name may both be called.

    Attributes:
        size: bytes on disk, what `tell` counts up to.
    """

    size: int

    @property
    def names(self) -> list[str]:
        """Tensors as they are stored."""

    def __contains__(self, name: str) -> bool:
        """Whether `read` knows the name."""

    def pieces(self, name: str) -> list[str]:
        """The stored tensors that a weight is made of."""

    def check(self, name: str, wanted: Sequence[int]) -> None:
        """Raises StartError where a weight is missing or of another shape. Reads nothing."""

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        """A weight, or a part of it, as floats."""

    def integers(self, name: str, shape: Sequence[int]) -> Quantised | None:
        """A weight as integers; None where it is stored otherwise."""

    def idle(self, name: str) -> bool:
        """Whether a stored tensor says nothing, so that it need not be used."""

    def close(self) -> None:
        """Closes the files."""


class Checkpoint:
    """The tensors of a folder; a context manager. Nothing is read before it is asked for.

    Weights that are stored as integers are read as floats by `read`, and as they are by `quantised`, both by the name
    that the float weight would have.

    Args:
        folder: holds one safetensors file, several with their index, or a GGUF file.
        progress: called with the share of the bytes that were read so far.
        allow_pickle: read pytorch_model.bin where there are no safetensors.

    Raises:
        StartError: no weights, a file that cannot be read, or a quantisation that is not known; the text names it.
    """

    def __init__(
        self, folder: Path, progress: Callable[[float], None] | None = None, allow_pickle: bool = False
    ) -> None:
        self._progress = progress
        self._done = 0
        self._used: dict[str, None] = {}
        self._source: Source
        if (folder / GGUF_NAME).is_file():
            from inflight.models.gguf import GgufWeights  # its package takes 0.1 s to import

            self._source = GgufWeights(folder / GGUF_NAME, self._tell)
        else:
            config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
            scheme = scheme_of(config)  # first: a method that is not known explains whatever is wrong with the files
            self._source = QuantisedFiles(TensorFiles(folder, allow_pickle, self._tell), scheme)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def __contains__(self, name: str) -> bool:
        return name in self._source

    @property
    def names(self) -> list[str]:
        """Tensors as they are stored: a quantised weight's by their own names."""
        return self._source.names

    def unused(self) -> list[str]:
        """Tensors that nobody asked for."""
        return [name for name in self.names if name not in self._used and not self._source.idle(name)]

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises StartError where the tensor is missing or has another shape. Reads nothing: before memory for it is
        reserved, so that a config that lies costs none."""
        self._source.check(name, shape)

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it, in the checkpoint's dtype; float32 where it is stored as integers.

        Args:
            shape: of the whole tensor, as the config wants it.

        Raises:
            StartError: it is missing, broken, of another shape or no floats; the text names tensor and file.
        """
        self._used.update(dict.fromkeys(self._source.pieces(name)))
        tensor = self._source.read(name, shape, part)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise StartError(
                f"tensor '{name}' is stored as {str(tensor.dtype).removeprefix('torch.')}, and the checkpoint says "
                "nothing of how to read it; use a checkpoint in bfloat16, float16 or float32, or one of AWQ or GPTQ"
            )
        return tensor

    def quantised(self, name: str, shape: Sequence[int], part: Part | None = None) -> Quantised | None:
        """A weight [n, k] as the integers that are stored.

        Args:
            part: outputs only, or all inputs.

        Returns:
            None where it is stored as floats, where its groups are no runs of inputs (GPTQ with desc_act), and for a
            part of the inputs: `read` gives those.

        Raises:
            StartError: as for `read`.
        """
        if part is not None and part[0] == 1 and (part[1], part[2]) != (0, shape[1]):
            return None
        found = self._source.integers(name, shape)
        if found is None:
            return None
        self._used.update(dict.fromkeys(self._source.pieces(name)))
        return found if part is None or part[0] == 1 else found.rows(part[1], part[2])

    def _tell(self, size: int) -> None:
        self._done += size
        if self._progress is not None and self._source.size:
            self._progress(min(1.0, self._done / self._source.size))
