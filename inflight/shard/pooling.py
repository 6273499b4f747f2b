"""Hidden states of a text that comes in chunks."""

from __future__ import annotations

import torch


class MeanPool:
    """Sums of hidden states of rows whose prompts come in chunks."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[torch.Tensor, int]] = {}

    def begin(self, id: int) -> None:
        """A row starts (again) from its first token."""
        self._sums.pop(id, None)

    def add(self, id: int, hidden: torch.Tensor) -> None:
        """Args: hidden: [n, H] of the next n tokens."""
        total, count = self._sums.get(id, (hidden.new_zeros(hidden.shape[-1], dtype=torch.float64), 0))
        # Added one after the other: chunks of another size must not change the rounding.
        for row in hidden.double():
            total = total + row
        self._sums[id] = (total, count + hidden.shape[0])

    def take(self, id: int) -> torch.Tensor:
        """The mean of a row that is complete."""
        total, count = self._sums.pop(id)
        return total / count
