"""Reads a folder's weights, some of which are stored as integers or small floats."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from inflight.checkpoint.files import Slice, Tensor, Tensors, sliced
from inflight.checkpoint.schemes import FLOATS, Scheme, StoredModule
from inflight.checkpoint.source import Source, share_of
from inflight.errors import StartError
from inflight.tensors import Weight

log = logging.getLogger("inflight")

_ROWS = 1024  # rows that are converted to floats at a time
_SUFFIX = ".weight"
_SAID = "the inputs of this GPTQ checkpoint are in an order of their own (desc_act), so it is computed in floats"


class QuantisedFiles(Source):
    """Weight files with quantised weights, which are recognised by the names of their tensors.

    Args:
        scheme: how weights are quantised; None: all are floats.
    """

    def __init__(self, files: Tensors, scheme: Scheme | None) -> None:
        self._files = files
        self._scheme = scheme
        self.names = files.names
        self.size = files.size
        self._said = False

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._module(name) is not None

    def pieces(self, name: str) -> list[str]:
        module = self._module(name)
        return [name] if module is None else module.stored

    def idle(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, which GPTQ's tools write for every module."""
        module = self._module(name.removesuffix(".bias") + _SUFFIX) if name.endswith(".bias") else None
        return module is not None and not self._files.whole(name).any()

    def shape(self, name: str) -> list[int] | None:
        return None if self._module(name) is not None else self._files.shape(name)

    def check(self, name: str, wanted: Sequence[int]) -> None:
        module = self._module(name)
        if module is None or self._scheme is None:
            self._files.check(name, wanted)
        else:
            self._scheme.check(module, _matrix(name, wanted))

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        module = self._module(name)
        if module is None or self._scheme is None:
            return _floats(name, self._files.read(name, shape, part))
        weight, order = self._scheme.read(module, _matrix(name, shape))
        if order is None or isinstance(weight, np.ndarray):
            return share_of(weight, part)
        if not self._said:
            self._said = True
            log.warning(_SAID)
        if part is not None and part.dim == 0:
            weight, part = weight.rows(part.first, part.end), None
        spread = np.empty(weight.shape, np.float32)
        for first in range(0, len(spread), _ROWS):
            spread[first : first + _ROWS, order] = weight.rows(first, first + _ROWS).dequantise()
        return sliced(spread, part)

    def release(self) -> None:
        self._files.release()

    def _module(self, name: str) -> StoredModule | None:
        """The stored tensors of a weight that is quantised; None: it is not."""
        if self._scheme is None or not name.endswith(_SUFFIX):
            return None
        stem = name.removesuffix(_SUFFIX)
        marks = self._scheme.marks
        if not any(all(f"{stem}.{suffix}" in self._files for suffix in mark) for mark in marks):
            return None
        return StoredModule(stem, self._scheme.suffixes, self._files)


def _floats(name: str, tensor: Tensor) -> Tensor:
    """A float tensor in a type that weights may have: double precision becomes single.

    Raises:
        StartError: they are not floats, and the config has no scheme to read them.
    """
    if tensor.dtype.name in FLOATS:
        return tensor
    if tensor.dtype == np.float64:
        return tensor.astype(np.float32)
    raise StartError(
        f"tensor '{name}' is stored as {tensor.dtype.name}, and the checkpoint says nothing of how to read it; use a "
        "checkpoint in bfloat16, float16 or float32, or one of AWQ or GPTQ"
    )


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise StartError(f"tensor '{name}' is quantised, the config wants shape {list(shape)}; are they of one model?")
    return shape[0], shape[1]
