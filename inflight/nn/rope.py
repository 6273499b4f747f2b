"""Rotary position embedding on torch's operators, by the frequencies of `inflight.checkpoint.rope`."""

from __future__ import annotations

import torch

from inflight.checkpoint import Rope
from inflight.nn.border import to_tensor

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine [T, 1, dim]; both halves hold the same angles."""


class Rotation:
    """One kind of rotation on a device."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._rope = rope
        self._inverse = to_tensor(rope.inverse).to(device)
        self._long = None if rope.long_inverse is None else to_tensor(rope.long_inverse).to(device)

    def turn(self, positions: torch.Tensor, dtype: torch.dtype, reach: torch.Tensor | None = None) -> Turn:
        """What turns tokens at their places.

        Args:
            positions: int64 [T].
            reach: int64 [T], see `inflight.checkpoint.rope`; None: of sequences that end at their tokens.
        """
        at = positions.unsqueeze(1)
        inverse = self._inverse
        if self._rope.original:
            inverse = self.far(at + 1 if reach is None else reach.unsqueeze(1))
        angles = at.float() * inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        factor = self._rope.factor
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def far(self, reach: torch.Tensor) -> torch.Tensor:
        """Frequencies [T, dim / 2] for reaches [T, 1], where they follow the length of a sequence."""
        rope = self._rope
        beyond = reach > rope.original
        if self._long is not None:
            return torch.where(beyond, self._long, self._inverse)
        grown = rope.stretch * reach.clamp(min=rope.original).double() / rope.original - (rope.stretch - 1)
        base = rope.theta * grown ** (rope.dim / max(rope.dim - 2, 1e-9))
        exponents = torch.arange(0, rope.dim, 2, device=reach.device).double() / rope.dim
        return torch.where(beyond, (1.0 / base**exponents).float(), self._inverse)

    def apply(self, x: torch.Tensor, turn: Turn) -> torch.Tensor:
        """x [T, heads, head_dim] with its leading `dim` components turned."""
        cos, sin = turn
        dim = self._rope.dim
        if x.shape[-1] != dim:
            return torch.cat([_turned(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
        return _turned(x, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
