"""Mean pooling of hidden states that are computed in chunks."""

from __future__ import annotations

import numpy as np

from inflight.contract import Array


class MeanPool:
    """Sums of hidden states of rows whose prompts come in chunks."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Array, int]] = {}

    def begin(self, id: int) -> None:
        """Forgets a row's sum, because its prompt starts (again)."""
        self._sums.pop(id, None)

    def add(self, id: int, hidden: Array) -> None:
        """Adds the states of a row's next n tokens. Args: hidden: [n, H]."""
        total, count = self._sums.get(id, (np.zeros(hidden.shape[-1]), 0))
        # One after the other, so that the chunks' size does not change the rounding.
        for row in hidden:
            total = total + row
        self._sums[id] = (total, count + len(hidden))

    def take(self, id: int) -> Array:
        """Removes a complete row and returns its mean, float32."""
        total, count = self._sums.pop(id)
        mean: Array = (total / count).astype(np.float32)
        return mean
