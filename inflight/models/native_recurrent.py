"""The recurrent layers of a decoder on the CPU engine."""

from __future__ import annotations

from collections.abc import Callable

from inflight.kernels import NativeProgram, Norm, Precision
from inflight.models.description import DecoderConfig
from inflight.models.recurrences import ConvNet, Recurrence
from inflight.models.recurrent_tensors import array_names
from inflight.models.states import Recurrent
from inflight.models.weight_loader import WeightLoader

Take = Callable[[str, Precision | None], tuple[int, ...]]
"""Adds a product by its name; gives its numbers."""


class RecurrentLayers:
    """Adds the operations of recurrent layers, whose rows pass two buffers: one before and one behind the recurrence.

    Args:
        take: of products, which are packed in `precision`.
    """

    def __init__(
        self,
        program: NativeProgram,
        config: DecoderConfig,
        recurrence: Recurrence,
        loader: WeightLoader,
        take: Take,
        precision: Precision | None,
    ) -> None:
        self._program = program
        self._recurrence = recurrence
        self._kernel = recurrence.kernel
        self._loader = loader
        self._take = take
        self._precision = precision
        self._eps = config.eps
        self._scale = config.residual_scale * config.multipliers.recurrent
        self._read, self._given = program.buffer(self._kernel.width), program.buffer(self._kernel.values)

    def read(self, x: int, name: str, before: Norm | None) -> None:
        """What the layer reads of x. Decays and steps are sensitive: their products stay floats."""
        products = self._take(f"{name}mixer_in", self._precision)
        if not isinstance(self._recurrence, ConvNet):
            products = (*products, *self._take(f"{name}mixer_rates", None))
        self._program.multiply(x, self._read, products, norm=before)

    def write(self, x: int, name: str) -> None:
        """x += what the layer gives."""
        program = self._program
        arrays = [
            -1 if kind is None else self._loader.array(program, f"{name}{kind}")
            for kind in array_names(self._recurrence)
        ]
        program.recur(self._read, self._given, program.recurrent(self._kernel, self._eps, arrays))
        product = self._take(f"{name}mixer_out", self._precision)
        program.multiply(self._given, x, product, add=True, scale=self._scale)

    @property
    def state(self) -> Recurrent:
        """What one layer keeps of a sequence."""
        return Recurrent(self._kernel.arrays)
