"""Rotary position embedding (Su et al., 2021), with the scalings that checkpoints use.

Frequencies follow the papers: linear (position interpolation), dynamic NTK, YaRN (Peng et al., 2023), LongRoPE (Ding et
al., 2024), and Llama 3's smoothed interpolation. A token's rotation depends on its own position only, never on the
length of anything else: LongRoPE takes its long factors from the first position after the original length on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from inflight.errors import StartError


@dataclass(frozen=True)
class Rope:
    """One kind of rotation.

    Attributes:
        dim: leading components of a head that turn.
        inverse: float32 [dim / 2], radians a position.
        factor: on cosine and sine.
        long_inverse: the frequencies from position `original` on, where they differ.
    """

    dim: int
    inverse: torch.Tensor
    factor: float = 1.0
    long_inverse: torch.Tensor | None = None
    original: int = 0

    def turn(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [T, 1, dim] for positions int64 [T]; both halves hold the same angles."""
        at = positions.unsqueeze(1)
        inverse: torch.Tensor = self.inverse
        if self.long_inverse is not None:
            inverse = torch.where(at < self.original, inverse, self.long_inverse)
        angles = at.float() * inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)

    def apply(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [T, heads, head_dim] with its leading `dim` components turned."""
        cos, sin = turn
        if x.shape[-1] != self.dim:
            return torch.cat([self._turned(x[..., : self.dim], cos, sin), x[..., self.dim :]], dim=-1)
        return self._turned(x, cos, sin)

    @staticmethod
    def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


def make_rope(settings: Mapping[str, Any], head_dim: int, max_positions: int, device: torch.device) -> Rope:
    """The rotation that a config's `rope_parameters` describe.

    Args:
        settings: `rope_type`, `rope_theta` and what the type needs.
        max_positions: the config's longest sequence.

    Raises:
        StartError: an unknown type, or a setting is missing.
    """
    kind = settings.get("rope_type") or settings.get("type") or "default"
    try:
        make = _KINDS[kind]
    except KeyError:
        raise StartError(f"rope type '{kind}' is unknown; known are {', '.join(_KINDS)}") from None
    dim = int(head_dim * settings.get("partial_rotary_factor", 1.0))
    try:
        rope = make(settings, head_dim, dim, max_positions)
    except KeyError as missing:
        raise StartError(f"rope type '{kind}' needs {missing} in the config's rope_parameters") from None
    long_inverse = None if rope.long_inverse is None else rope.long_inverse.to(device)
    return Rope(rope.dim, rope.inverse.to(device), rope.factor, long_inverse, rope.original)


def _plain(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def _default(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    return Rope(dim, _plain(settings["rope_theta"], dim))


def _linear(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    return Rope(dim, _plain(settings["rope_theta"], dim) / settings["factor"])


def _dynamic(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    """Scales beyond the config's length only, where no sequence of ours comes."""
    return Rope(dim, _plain(settings["rope_theta"], dim))


def _proportional(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    """The first components turn as in a whole head, the others stand still."""
    turning = int(settings.get("partial_rotary_factor", 1.0) * head_dim // 2)
    inverse = 1.0 / settings["rope_theta"] ** (torch.arange(0, 2 * turning, 2).float() / head_dim)
    still = torch.zeros(head_dim // 2 - turning)
    return Rope(head_dim, torch.cat([inverse, still]) / settings.get("factor", 1.0))


def _yarn(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    theta, original = settings["rope_theta"], settings["original_max_position_embeddings"]
    factor = settings.get("factor") or longest / original

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = settings.get("attention_factor")
    if scale is None:
        weight, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = magnitude(weight) / magnitude(all_dims) if weight and all_dims else magnitude(1.0)

    def component(turns: float) -> float:
        """The component that makes so many turns within the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(settings.get("beta_fast") or 32), component(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    plain = _plain(theta, dim)
    return Rope(dim, plain / factor * ramp + plain * (1 - ramp), scale)


def _longrope(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    theta = settings["rope_theta"]
    original = settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or longest / original
    scale = settings.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    exponents = theta ** (torch.arange(0, dim, 2).float() / dim)
    short, long = (1.0 / (torch.tensor(settings[key]).float() * exponents) for key in ("short_factor", "long_factor"))
    return Rope(dim, short, scale, long, original)


def _llama3(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    plain = _plain(settings["rope_theta"], dim)
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    original = settings["original_max_position_embeddings"]
    turns = original * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return Rope(dim, (1 - smooth) * plain / factor + smooth * plain)


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
