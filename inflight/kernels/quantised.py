"""Weights as integers: what every quantised checkpoint is read into, and what the CPU engine packs.

    w[n, k] = scales[n, k // group] * codes[n, k] - offsets[n, k // group]

Codes are unsigned. Without offsets the scheme is symmetric: the code 2 ** (bits - 1) stands for 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantised:
    """One weight [n, k].

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; the last group of a row may be shorter.
        codes: uint8 [n, k], each below 2 ** bits.
        scales: float32 [n, ceil(k / group)].
        offsets: float32 [n, ceil(k / group)], what is subtracted (scale times zero point); None: symmetric.
    """

    bits: int
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 1 or self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise ValueError(f"no weight of {self.bits} bits in groups of {self.group}")
        wanted = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        for each in (self.scales, self.offsets):
            if each is not None and (each.shape != wanted or each.dtype != torch.float32):
                raise ValueError(f"scales {list(each.shape)} {each.dtype} do not fit codes {list(self.codes.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [n, k] that the integers stand for."""
        n, k = self.shape
        codes = torch.nn.functional.pad(self.codes, (0, -k % self.group)).float().view(n, -1, self.group)
        if self.offsets is None:
            codes.sub_(2 ** (self.bits - 1)).mul_(self.scales.unsqueeze(-1))
        else:
            codes.mul_(self.scales.unsqueeze(-1)).sub_(self.offsets.unsqueeze(-1))
        return codes.view(n, -1)[:, :k].to(dtype).contiguous()

    def rows(self, first: int, end: int) -> Quantised:
        """Outputs [first, end)."""
        offsets = None if self.offsets is None else self.offsets[first:end]
        return Quantised(self.bits, self.group, self.codes[first:end], self.scales[first:end], offsets)


def stack(parts: Sequence[Quantised]) -> Quantised:
    """Weights of the same scheme, one above the other: the outputs of all, the same inputs.

    Raises:
        ValueError: their schemes differ.
    """
    first = parts[0]
    if any((p.bits, p.group, p.offsets is None) != (first.bits, first.group, first.offsets is None) for p in parts):
        raise ValueError("weights of different schemes cannot be one product")
    return Quantised(
        first.bits,
        first.group,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        None if first.offsets is None else torch.cat([part.offsets for part in parts if part.offsets is not None]),
    )


def quantise(weight: torch.Tensor, bits: int, group: int | None = None) -> Quantised:
    """A weight [n, k] rounded to the nearest code, symmetric.

    Args:
        group: inputs that share a scale; None: all of a row.

    The scale maps the largest magnitude of a group to 127 (8 bits) or to the code 0, which is -8 (4 bits: the extreme
    value gets the longer side, as in llama.cpp's Q4_0). Scales of groups are rounded to float16, as they are kept.
    """
    n, k = weight.shape
    size = k if group is None else group
    padded = -(-k // size) * size
    wide = torch.zeros(n, padded, dtype=torch.float32)
    wide[:, :k] = weight
    wide = wide.view(n, -1, size)
    if bits == 8:
        scales = wide.abs().amax(dim=-1) / 127
    else:
        largest = wide.gather(-1, wide.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        scales = largest / -8
    if group is not None:
        scales = scales.half().float()
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    middle = 2 ** (bits - 1)
    codes = (wide * inverse.unsqueeze(-1)).round_().add_(middle).clamp_(0, 2 * middle - 1).to(torch.uint8)
    return Quantised(bits, size, codes.view(n, padded)[:, :k].contiguous(), scales)
