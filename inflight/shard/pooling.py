"""Hidden states of a text that comes in chunks."""

from __future__ import annotations

import numpy as np

from inflight.contract import Array


class MeanPool:
    """Sums of hidden states of rows whose prompts come in chunks."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Array, int]] = {}

    def begin(self, id: int) -> None:
        """A row starts (again) from its first token."""
        self._sums.pop(id, None)

    def add(self, id: int, hidden: Array) -> None:
        """Args: hidden: [n, H] of the next n tokens."""
        total, count = self._sums.get(id, (np.zeros(hidden.shape[-1]), 0))
        # Added one after the other: chunks of another size must not change the rounding.
        for row in hidden:
            total = total + row
        self._sums[id] = (total, count + len(hidden))

    def take(self, id: int) -> Array:
        """The mean of a row that is complete, float32."""
        total, count = self._sums.pop(id)
        mean: Array = (total / count).astype(np.float32)
        return mean
