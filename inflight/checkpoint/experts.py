"""The experts of gpt-oss by the names of single weights, as a checkpoint of its makers stores them together.

Floats: `gate_up_proj` [experts, hidden, 2 inner] and `down_proj` [experts, inner, hidden], which are transposed. MXFP4:
`gate_up_proj_blocks` uint8 [experts, 2 inner, groups, 16] and `gate_up_proj_scales` uint8 [experts, 2 inner, groups],
and so `down_proj`: of each byte the low half is the first input. In both, rows of gate and up alternate. Source:
GptOssExperts and integrations/mxfp4.py of huggingface/transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inflight.checkpoint.files import Slice, Tensor, Tensors, sliced
from inflight.checkpoint.source import Source, share_of
from inflight.checkpoint.unpack import Codes, nibbles
from inflight.errors import StartError
from inflight.tensors import Blocks, Weight

_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_ALL = re.compile(r".+\.experts\.(?:gate_up|down)_proj(?:_bias)?")
_GROUP, _BYTES = 32, 16  # inputs that share a scale, and their bytes


class _Part(NamedTuple):
    """One expert's weight or bias: `stem` names the tensor that it is in, [experts, ...]; `rows`: which of an expert's
    rows."""

    stem: str
    expert: int
    rows: slice
    bias: bool


class StackedExperts(Source):
    """A source whose experts have names of their own, as `mlp.experts.3.gate_proj.weight`.

    Args:
        files: the stored tensors.
        others: reads all other weights.
    """

    def __init__(self, files: Tensors, others: Source) -> None:
        self._files = files
        self._others = others
        self.names = others.names
        self.size = others.size

    def __contains__(self, name: str) -> bool:
        if _ALL.fullmatch(name) is not None:
            return False  # its parts have names
        part = self._find(name)
        return name in self._others or (part is not None and self._stored(part)[0] in self._files)

    def pieces(self, name: str) -> list[str]:
        part = self._find(name)
        return self._others.pieces(name) if part is None else self._stored(part)

    def idle(self, name: str) -> bool:
        return self._others.idle(name)

    def shape(self, name: str) -> list[int] | None:
        return self._others.shape(name) if self._find(name) is None else None

    def check(self, name: str, wanted: Sequence[int]) -> None:
        part = self._find(name)
        if part is None:
            return self._others.check(name, wanted)
        both = 1 if part.rows.step is None else 2
        shape = [wanted[0] * both, *wanted[1:]]
        found = self._shape_of(part)
        if found[1:] != shape or part.expert >= found[0]:
            raise StartError(
                f"tensor '{self._stored(part)[0]}' has experts of shape {found[1:]}, {found[0]} of them; the config "
                f"wants {shape} of expert {part.expert}; are config.json and the weights of one model?"
            )
        return None

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        found = self._find(name)
        if found is None:
            return self._others.read(name, shape, part)
        self.check(name, shape)
        if found.bias:
            return sliced(self._whole(found.stem, found.expert)[found.rows], part)
        if f"{found.stem}_blocks" not in self._files:
            return sliced(self._whole(found.stem, found.expert).T[found.rows], part)
        octets = self._whole(f"{found.stem}_blocks", found.expert)[found.rows]
        exponents = self._whole(f"{found.stem}_scales", found.expert)[found.rows]
        if octets.dtype != np.uint8 or exponents.dtype != np.uint8:
            raise StartError(
                f"tensors '{found.stem}_blocks' and '_scales' are not stored as bytes; download them again"
            )
        if exponents.size and exponents.max() == 255:
            raise StartError(f"tensor '{found.stem}_scales' has a scale that is not a number; download it again")
        return share_of(as_blocks(octets, exponents), part)

    def release(self) -> None:
        self._others.release()

    def _find(self, name: str) -> _Part | None:
        """None: the weight has a tensor of its own."""
        return None if name in self._others else _part(name)

    def _whole(self, name: str, expert: int) -> Tensor:
        [tensor] = self._files.read(name, self._files.shape(name), Slice(0, expert, expert + 1))
        own: Tensor = tensor
        return own

    def _stored(self, part: _Part) -> list[str]:
        """The tensors that hold it."""
        packed = [f"{part.stem}_blocks", f"{part.stem}_scales"]
        return packed if not part.bias and packed[0] in self._files else [part.stem]

    def _shape_of(self, part: _Part) -> list[int]:
        """Experts, then the shape of one, as `Weights` has it."""
        [first, *others] = self._stored(part)
        found = self._files.shape(first)
        if others:
            groups = self._files.shape(others[0])
            if len(found) != 4 or found[3] != _BYTES or groups != found[:3]:
                raise StartError(f"tensors '{first}' {found} and '{others[0]}' {groups} are no weights in MXFP4")
            return [*found[:2], found[2] * _GROUP]
        if len(found) != (2 if part.bias else 3):
            raise StartError(f"tensor '{first}' has shape {found}, where those of all experts belong")
        return found if part.bias else [found[0], found[2], found[1]]


def as_blocks(octets: Codes, exponents: Codes) -> Blocks:
    """Rows in ggml's blocks: the exponent, then bytes whose low halves are the first 16 inputs.

    Args:
        octets: uint8 [n, groups, 16].
        exponents: uint8 [n, groups].
    """
    n, groups, _ = octets.shape
    codes = nibbles(octets)
    data = np.empty((n, groups, 1 + _BYTES), np.uint8)
    data[..., 0] = exponents
    data[..., 1:] = codes[..., :_BYTES] | codes[..., _BYTES:] << 4
    return Blocks("MXFP4", (n, groups * _GROUP), data.reshape(n, -1))


def _part(name: str) -> _Part | None:
    match = _ONE.fullmatch(name)
    if match is None:
        return None
    experts, number, kind, form = match.groups()
    stem = f"{experts}.{'down' if kind == 'down' else 'gate_up'}_proj"
    rows = slice(None) if kind == "down" else slice(0 if kind == "gate" else 1, None, 2)
    return _Part(f"{stem}_bias" if form == "bias" else stem, int(number), rows, form == "bias")
