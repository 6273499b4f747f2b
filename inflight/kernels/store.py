"""What programs on the CPU engine have in common: packed weights, numbered buffers, a list of operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inflight.kernels.arrays import address
from inflight.kernels.layout import Precision
from inflight.kernels.library import native, native_reason
from inflight.kernels.pack import Packer
from inflight.tensors import Blocks, Floats, Weight, widened


class Store:
    """A native program and its weights.

    Args:
        kind: the native class of the program; arguments: of its constructor.

    Attributes:
        isa: the instruction set in use.
        bytes: memory of the packed weights.
    """

    def __init__(self, kind: str, *arguments: Any) -> None:
        if native is None:
            raise RuntimeError(native_reason())
        self._program: Any = getattr(native, kind)(*arguments)
        self._widths: list[int] = []
        self._norms: list[int] = []
        self._packer = Packer(self._program)

    @property
    def isa(self) -> str:
        return str(self._program.isa)

    @property
    def bytes(self) -> int:
        return int(self._program.bytes)

    def product(
        self,
        weight: Weight | Sequence[Blocks],
        bias: Floats | None = None,
        precision: Precision | None = None,
        *,
        gated: bool = False,
    ) -> int:
        """Packs a copy of a weight [n, k].

        Args:
            weight: float32, bfloat16 or float16, integers, or blocks; or a list of blocks of one type, which are
                stacked. Blocks keep their type.
            bias: [n].
            precision: how floats are packed; None: float32 stays, the others become bfloat16.
            gated: the first half of the outputs goes through an activation and is multiplied with the second.
        """
        return self._packer.pack(weight, bias, precision, gated=gated)

    def weight(self, values: Floats) -> int:
        """Adds a norm's weight or bias [n], as float32."""
        held = widened(values)
        self._norms.append(held.size)
        return int(self._program.add_norm(address(held), held.size))

    def _fits(self, width: int, buffer: int) -> None:
        if self._widths[buffer] != width:
            raise ValueError(f"{width} columns do not fit buffer {buffer} of {self._widths[buffer]}")

    def _norm_fits(self, number: int, width: int) -> None:
        if self._norms[number] != width:
            raise ValueError(f"a norm of {self._norms[number]} values does not fit {width} columns")

    def _append(self, operation: Any, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            setattr(operation, name, value)
        self._program.add(operation)
