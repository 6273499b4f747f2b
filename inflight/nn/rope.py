"""Rotary position embedding on torch's operators, by the frequencies of `inflight.checkpoint.rope`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inflight.checkpoint import Rope
from inflight.nn.border import to_tensor

CosSin = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine [T, 1, dim]; both halves hold the same angles."""


class Rotation:
    """One kind of rotation on a device.

    Args:
        axes: number of the axis that turns each pair of components; empty: tokens have one position.
    """

    def __init__(self, rope: Rope, device: torch.device, axes: Sequence[int] = ()) -> None:
        self._rope = rope
        self._axes = torch.tensor(axes, dtype=torch.int64, device=device)
        self._inverse = to_tensor(rope.inverse).to(device)
        self._long = None if rope.long_inverse is None else to_tensor(rope.long_inverse).to(device)

    def cos_sin(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        reach: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> CosSin:
        """Cosines and sines of the angles at these positions.

        Args:
            positions: int64 [T].
            reach: int64 [T], see `inflight.checkpoint.rope`; None: up to each token itself.
            places: int64 [3, T], positions by axis; None: `positions` on all axes.
        """
        at = positions.unsqueeze(1)
        inverse = self._inverse
        if self._rope.original:
            inverse = self.far(at + 1 if reach is None else reach.unsqueeze(1))
        turns = at if places is None or not len(self._axes) else places[self._axes].T
        angles = turns.float() * inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        factor = self._rope.factor
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def far(self, reach: torch.Tensor) -> torch.Tensor:
        """Frequencies [T, dim / 2] for reaches [T, 1], if they depend on the length of a sequence."""
        rope = self._rope
        beyond = reach > rope.original
        if self._long is not None:
            return torch.where(beyond, self._long, self._inverse)
        grown = rope.stretch * reach.clamp(min=rope.original).double() / rope.original - (rope.stretch - 1)
        base = rope.theta * grown ** (rope.dim / max(rope.dim - 2, 1e-9))
        exponents = torch.arange(0, rope.dim, 2, device=reach.device).double() / rope.dim
        return torch.where(beyond, (1.0 / base**exponents).float(), self._inverse)

    def apply(self, x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """Rotates the leading `dim` components of x [T, heads, head_dim]."""
        cos, sin = cos_sin
        dim = self._rope.dim
        if x.shape[-1] != dim:
            return torch.cat([_rotated(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
        return _rotated(x, cos, sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
