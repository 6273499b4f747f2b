"""What the families' native towers share: settings, weights on their way into a program, layers, patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.kernels import ACTIVATIONS, Activation, Format, Precision, TowerNorm, TowerProgram
from inflight.tensors import Floats, ordered
from inflight.version import __version__

Indices = np.ndarray[Any, np.dtype[np.int64]]

KINDS = {**ACTIVATIONS, "quick_gelu": "GELU_QUICK"}
"""Names in `Activation` by their names in a config."""


@dataclass(frozen=True)
class NativeSettings:
    """How a tower is computed.

    Attributes:
        threads: that work on it.
        dtype: of its products and of attention: float32 or bfloat16.
        int8: the layers' products have 8 bits; patches and the join to the language model keep `dtype`.
        isa: the instruction set; None: the best.
    """

    threads: int
    dtype: str = "float32"
    int8: bool = False
    isa: str | None = None


class NotNative(Exception):
    """A kind of a family's tower that only torch computes."""


def number(config: dict[str, Any], name: str) -> int:
    """A field that is a whole number, or a list of equal ones (sides of a square).

    Raises:
        StartError: it is missing, or of another form.
    """
    value = field(config, name)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and each == values[0] and each > 0 for each in values):
        raise StartError(f"config.json: '{name}' of the vision part is {value}, not one positive number")
    return int(values[0])


def field(config: dict[str, Any], name: str, default: Any = None) -> Any:
    """A field of a config, which may lack it if there is a default.

    Raises:
        StartError: it is missing.
    """
    value = config.get(name, default)
    if value is None:
        raise StartError(f"config.json: the vision part has no '{name}'")
    return value


def activation(name: str) -> Activation:
    """Raises StartError: an unknown one."""
    if name not in KINDS:
        raise StartError(f"config.json: the vision part's activation '{name}' is none of {', '.join(KINDS)}")
    return Activation[KINDS[name]]


class Parts:
    """A tower's program, and the checkpoint from which its weights come.

    Args:
        weights: of the checkpoint.
        settings: how it is computed.
    """

    def __init__(self, weights: Weights, settings: NativeSettings) -> None:
        self.weights = weights
        self._plain = Precision(Format.FLOAT if settings.dtype == "float32" else Format.BF16)
        self._layers = Precision(Format.INT8) if settings.int8 else self._plain
        try:
            half = settings.dtype != "float32" or settings.int8
            self.program = TowerProgram(settings.threads, half=half, isa=settings.isa)
        except ValueError as error:
            raise StartError(f"the setting cpu_isa: {error}") from error
        kind = "int8" if settings.int8 else settings.dtype
        parts = " from bfloat16 parts" if self.program.splits and not half else ""
        self.identity = f"native {__version__} {self.program.isa} {kind}{parts}"

    def prefix(self, ending: str) -> str:
        """What stands in front of `ending` in the name of the one weight that ends so.

        Raises:
            StartError: none does, or several do.
        """
        found = [name.removesuffix(ending) for name in self.weights.names if name.endswith(ending)]
        if len(found) != 1:
            raise StartError(f"{len(found)} tensors end with '{ending}', where the vision part has one")
        return found[0]

    def outputs(self, name: str) -> int:
        """How many outputs `<name>.weight` has.

        Raises:
            StartError: it is missing, or packed in a form that does not say.
        """
        shape = self.weights.shape(f"{name}.weight")
        if shape is None:
            raise StartError(f"tensor '{name}.weight' is packed, where floats belong")
        return shape[0]

    def fits(self, right: bool, name: str, shape: Sequence[int]) -> None:
        """Raises StartError if a tensor's shape is not the config's."""
        if not right:
            raise StartError(f"tensor '{name}' is {list(shape)}, which does not fit the vision part of config.json")

    def floats(self, name: str, shape: Sequence[int]) -> Floats:
        """A copy of a weight, as float32."""
        self.weights.check(name, shape)
        held = np.asarray(self.weights.floats(name), np.float32)
        self.weights.release()
        return held

    def product(
        self,
        name: str,
        shape: Sequence[int],
        *,
        bias: bool = True,
        layer: bool = True,
        factor: Floats | None = None,
        order: Indices | None = None,
    ) -> int:
        """Packs `<name>.weight`, and with `bias` `<name>.bias`.

        Args:
            shape: of the weight; all but the first count as inputs.
            layer: not: patches and joins, which keep their type in a tower of 8 bits.
            factor: [outputs] by which the outputs are multiplied.
            order: of the outputs, where it is not the checkpoint's; then there is no bias.
        """
        weight = self.weights.read(f"{name}.weight", shape)
        held = self.floats(f"{name}.bias", shape[:1]) if bias else None
        if isinstance(weight, np.ndarray):
            weight = weight.reshape(shape[0], -1)
            if factor is not None:
                weight = weight.astype(np.float32) * factor[:, None]
        elif factor is not None:
            weight = weight.dequantise() * factor[:, None]
        if factor is not None and held is not None:
            held = held * factor
        if order is not None:
            weight = ordered(weight, order.tolist())
        number = self.program.product(weight, held, self._layers if layer else self._plain)
        self.weights.release()
        return number

    def pack(self, weight: Floats, bias: Floats | None) -> int:
        """Packs floats [outputs, inputs] that belong to no layer."""
        return self.program.product(weight, bias, self._plain)

    def gated(self, names: Sequence[str], shape: Sequence[int], *, bias: bool) -> int:
        """Packs a gate and what it multiplies, of the same shape, as one product."""
        weights = []
        for name in names:
            weight = self.weights.read(f"{name}.weight", shape)
            weights.append(weight if isinstance(weight, np.ndarray) else weight.dequantise())
        held = np.concatenate([self.floats(f"{name}.bias", shape[:1]) for name in names]) if bias else None
        number = self.program.product(np.concatenate(weights), held, self._layers, gated=True)
        self.weights.release()
        return number

    def norm(self, name: str, width: int, eps: float, *, bias: bool = True) -> TowerNorm:
        """A LayerNorm, or without bias an RMSNorm."""
        weight = self.program.weight(self.floats(f"{name}.weight", [width]))
        return TowerNorm(weight, self.program.weight(self.floats(f"{name}.bias", [width])) if bias else None, eps)


def patches(pixels: Floats, size: int) -> Floats:
    """Cuts a picture [3, height, width] into rows [patches, 3 * size * size], in the order of a convolution's weights.

    What is left over at the right and at the bottom is cut off, as a convolution does.
    """
    channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    cut = pixels[:, : rows * size, : columns * size].reshape(channels, rows, size, columns, size)
    return np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, channels * size * size)


def blocks(rows: int, columns: int, factor: int) -> Indices:
    """The patches [tokens, factor ** 2] of each square of a grid, which become one token.

    Raises:
        ValueError: the grid does not divide.
    """
    if rows % factor or columns % factor:
        raise ValueError(f"{rows} x {columns} patches do not divide into squares of {factor}")
    grid = np.arange(rows * columns).reshape(rows // factor, factor, columns // factor, factor)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3)).reshape(-1, factor**2)


def axial_angles(rows: Indices, columns: Indices, dim: int, theta: float) -> Floats:
    """Cosines and sines [patches, dim] of a rotation whose first pairs turn by the row, the others by the column."""
    inverse = (1.0 / theta ** (np.arange(0, dim // 2, 2, dtype=np.float32) / np.float32(dim // 2))).astype(np.float32)
    turns = [at.astype(np.float32)[:, None] * inverse for at in (rows, columns)]
    angles = np.concatenate(turns, axis=1)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
