"""Recurrent layers of a program: what they are, their states' memory, the operations that run them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inflight.kernels.library import OpCode, native
from inflight.kernels.store import Store


@dataclass(frozen=True)
class Delta:
    """A recurrent layer: the gated delta rule behind a short causal convolution (Yang et al., 2024, "Gated Delta
    Networks").

    Attributes:
        key_heads, value_heads: each key head serves value_heads / key_heads value heads.
        key_dim, value_dim: of a head.
        taps: inputs of the convolution, 2 to 8.
        tiled: value head j belongs to key head j % key_heads; else the value heads of a key head follow each other.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    tiled: bool = False

    @property
    def channels(self) -> int:
        """Queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def values(self) -> int:
        """Values of all heads."""
        return self.value_heads * self.value_dim

    @property
    def width(self) -> int:
        """Columns that the layer reads: `channels`, z of all value heads, then of each its β and its decay."""
        return self.channels + self.values + 2 * self.value_heads

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """A row's state."""
        inputs = self.taps - 1, self.channels
        return {"inputs": inputs, "memory": (self.value_heads, self.key_dim, self.value_dim)}


@dataclass(frozen=True)
class ShortConv:
    """A recurrent layer: a gated short convolution (LFM2), C * conv(B * x).

    Attributes:
        channels: of B, C and x each.
        taps: inputs of the convolution, 2 to 8.
    """

    channels: int
    taps: int

    @property
    def values(self) -> int:
        """Columns that the layer gives."""
        return self.channels

    @property
    def width(self) -> int:
        """Columns that the layer reads: B, C, x."""
        return 3 * self.channels

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """A row's state."""
        return {"inputs": (self.taps - 1, self.channels)}


@dataclass(frozen=True)
class Mamba:
    """A recurrent layer: a selective state space behind a short causal convolution (Dao and Gu, 2024, "Transformers are
    SSMs"; Mamba 2).

    Attributes:
        heads, head_dim: of x, of the gate and of the result.
        groups: heads of a group share B and C [state], and the norm of the result.
        taps: inputs of the convolution, 2 to 8.
        gate_scale, step_scale: factors of the gate's and of the steps' columns.
        least, most: bounds of a step.
        norm_first: the norm comes before the gate.
        normed: there is a norm.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    gate_scale: float = 1.0
    step_scale: float = 1.0
    least: float = 0.0
    most: float = math.inf
    norm_first: bool = False
    normed: bool = True

    @property
    def channels(self) -> int:
        """Columns that pass the convolution: x of all heads, B and C of all groups."""
        return self.values + 2 * self.groups * self.state

    @property
    def values(self) -> int:
        """Columns that the layer gives."""
        return self.heads * self.head_dim

    @property
    def width(self) -> int:
        """Columns that the layer reads: the gate, `channels`, then a step of each head."""
        return self.values + self.channels + self.heads

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """A row's state."""
        return {"inputs": (self.taps - 1, self.channels), "memory": (self.heads, self.state, self.head_dim)}


RecurrentLayer = Delta | ShortConv | Mamba


class RecurrentProgram(Store):
    """The recurrent layers of a decoder's program. They are named by their numbers, in the order in which they came."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        super().__init__(kind, *arguments)
        self._recurrent: list[RecurrentLayer] = []
        self._count = 0  # of operations

    def recurrent(self, layer: RecurrentLayer, eps: float, arrays: Sequence[int]) -> int:
        """Adds a recurrent layer; `make_states` makes memory for the rows' states.

        Args:
            eps: of the norm of its result.
            arrays: numbers of `weight`, -1 where the layer has none. First the convolution [taps, channels] with the
                oldest input's factors first. `Delta`: then by value head -exp(A_log) and the bias of the decays'
                logits, the norm [value_dim]. `ShortConv`: its bias. `Mamba`: its bias, by head -exp(A_log), the steps'
                bias and D, the norm [values].

        Raises:
            ValueError: they do not fit the layer.
        """
        if isinstance(layer, Delta):
            self._check_arrays(arrays, (layer.value_heads, layer.value_heads, layer.value_dim), layer, optional=())
            heads = layer.key_heads, layer.value_heads, layer.key_dim, layer.value_dim
            number = self._program.add_delta(*heads, layer.taps, layer.tiled, eps, list(arrays))
        elif isinstance(layer, ShortConv):
            self._check_arrays(arrays, (layer.channels,), layer, optional=(1,))
            number = self._program.add_short_conv(layer.channels, layer.taps, list(arrays))
        else:
            sizes = layer.channels, layer.heads, layer.heads, layer.heads, layer.values
            self._check_arrays(arrays, sizes, layer, optional=(1,) if layer.normed else (1, 5))
            shape = layer.heads, layer.head_dim, layer.groups, layer.state, layer.taps
            scales = layer.gate_scale, layer.step_scale, layer.least, layer.most
            number = self._program.add_mamba(*shape, *scales, layer.norm_first, eps, list(arrays))
        self._recurrent.append(layer)
        return int(number)

    def _check_arrays(
        self, arrays: Sequence[int], sizes: Sequence[int], layer: RecurrentLayer, optional: Sequence[int]
    ) -> None:
        """Args: sizes: of all arrays behind the convolution's. optional: places where -1 may stand."""
        for place, (number, size) in enumerate(zip(arrays, (layer.taps * layer.channels, *sizes), strict=True)):
            if number >= 0 or place not in optional:
                self._norm_fits(number, size)

    @property
    def state_bytes(self) -> int:
        """Bytes of one row's states of all recurrent layers."""
        return int(self._program.state_bytes) if self._recurrent else 0

    def make_states(self, slots: int) -> None:
        """Makes memory for so many states, which is touched where it is used. A row's state is zero at its first token,
        whatever its slot holds."""
        self._program.make_states(slots)

    def copy_state(self, from_: int, to: int) -> None:
        """Copies the state in one slot to another.

        Raises:
            IndexError: there is no such slot.
        """
        self._program.copy_state(from_, to)

    def recur(self, from_: int, to: int, layer: int) -> None:
        """to = what a recurrent layer gives: `values` columns of its heads, normed and gated.

        Args:
            from_: `width` columns. Those that pass a convolution are overwritten.
        """
        spec = self._recurrent[layer]
        self._fits(spec.width, from_)
        self._fits(spec.values, to)
        self._add(OpCode.RECUR, from_=from_, to=to, layer=layer)

    def output_gate(self, from_: int, column: int, to: int) -> None:
        """to *= σ of the columns of `from` from `column` on; where there is one only, all of a row by that."""
        columns = self._widths[from_] - column
        if columns not in (1, self._widths[to]):
            raise ValueError(f"{columns} columns are no gate of {self._widths[to]}")
        self._add(OpCode.OUTPUT_GATE, from_=from_, to=to, column=column)

    def _add(self, code: OpCode, **settings: Any) -> None:
        operation = native.Operation()
        operation.code = code
        self._append(operation, settings)
        self._count += 1
