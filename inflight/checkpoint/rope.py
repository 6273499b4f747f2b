"""Frequencies of rotary position embedding (Su et al., 2021), with the scalings that checkpoints use.

Frequencies follow the papers, in the form that transformers gave them: linear (position interpolation), dynamic NTK,
YaRN (Peng et al., 2023), LongRoPE (Ding et al., 2024), and Llama 3's smoothed interpolation.

In two of them a token's rotation depends on the length of its sequence, its *reach*. LongRoPE has one list of factors
for sequences within the original length and another for all tokens of longer ones. Dynamic NTK rotates the tokens of a
prompt by the prompt's length and each later token by its own position, as transformers does with its cache. A reach
depends on the sequence alone, so that neighbours, chunks and replays do not change results. The scheduler recomputes a
sequence when it grows beyond LongRoPE's original length (`Rope.switch`).

Powers are computed in float64 and rounded to float32, so that all machines and both engines get the same frequencies;
everything else is float32, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.errors import StartError

Frequencies = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Rope:
    """One kind of rotation.

    Attributes:
        dim: leading components of a head that are rotated.
        inverse: float32 [dim / 2], radians per position.
        factor: of cosines and sines.
        long_inverse: the frequencies of sequences longer than `original`, None: the same.
        original: the length up to which `inverse` holds; 0: for all lengths.
        theta, stretch: base and factor of dynamic NTK, which holds beyond `original`; `stretch` is 0 elsewhere.
    """

    dim: int
    inverse: Frequencies
    factor: float = 1.0
    long_inverse: Frequencies | None = None
    original: int = 0
    theta: float = 0.0
    stretch: float = 0.0

    @property
    def switch(self) -> int:
        """The length beyond which all tokens of a sequence are rotated in another way; 0: no such length."""
        return self.original if self.long_inverse is not None else 0

    @property
    def stretched(self) -> int:
        """The length beyond which a prompt's tokens are rotated by the prompt's length; 0: no such length."""
        return self.original if self.stretch else 0


def rope_type(settings: Mapping[str, Any]) -> str:
    """A rotation's type, by transformers' names, from `rope_type` or the older key `type`."""
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    return "longrope" if kind == "su" else kind


def rope_length(settings: Mapping[str, Any], max_positions: int) -> int:
    """Tokens of the longest sequence: a config's `max_position_embeddings` after the scaling.

    transformers sets no limit; these are vLLM's. The config's own length is already the long one for LongRoPE and Llama
    3, and for YaRN if its original length is given and its product with the factor is less.
    """
    kind, factor = rope_type(settings), settings.get("factor") or 1.0
    if kind in ("linear", "dynamic"):
        return max(max_positions, int(max_positions * factor))
    if kind == "yarn":
        original = settings.get("original_max_position_embeddings") or max_positions
        return max(max_positions, int(original * factor))
    return max_positions


def make_rope(settings: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """The rotation that a config's `rope_parameters` describe.

    Args:
        settings: `rope_type`, `rope_theta` and what the type needs.
        max_positions: the config's `max_position_embeddings`.

    Raises:
        StartError: an unknown type, or a setting is missing or makes no sense.
    """
    kind = rope_type(settings)
    try:
        make = _KINDS[kind]
    except KeyError:
        if kind == "mrope" or "mrope_section" in settings:
            raise StartError(
                "rope type 'mrope' rotates tokens by their places in images and videos; use the family's text model"
            ) from None
        raise StartError(f"rope type '{kind}' is unknown; known are {', '.join(_KINDS)}") from None
    dim = int(head_dim * (settings.get("partial_rotary_factor") or 1.0))
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            return make(settings, head_dim, dim, max_positions)
    except KeyError as missing:
        raise StartError(f"rope type '{kind}' needs {missing} in the config's rope_parameters") from None
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise StartError(f"the config's rope_parameters of type '{kind}' make no sense: {error}") from error


def _powers(theta: float, dim: int, count: int | None = None) -> Frequencies:
    """theta ** (2 i / dim), float32 [count]; the exponents are rounded to float32 first."""
    exponents = np.arange(0, dim if count is None else 2 * count, 2).astype(np.float32) / np.float32(dim)
    powers: Frequencies = (float(theta) ** exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(theta: float, dim: int) -> Frequencies:
    inverse: Frequencies = np.float32(1) / _powers(theta, dim)
    return inverse


def _default(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    return Rope(dim, _plain(settings["rope_theta"], dim))


def _linear(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    return Rope(dim, _plain(settings["rope_theta"], dim) / np.float32(settings["factor"]))


def _dynamic(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    theta = settings["rope_theta"]
    return Rope(dim, _plain(theta, dim), original=longest, theta=theta, stretch=settings["factor"])


def _proportional(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    """Frequencies of a head whose first components are rotated as in a whole head; the others have frequency 0."""
    rotated = int(settings.get("partial_rotary_factor", 1.0) * head_dim // 2)
    inverse = np.float32(1) / _powers(settings["rope_theta"], head_dim, rotated)
    still = np.zeros(head_dim // 2 - rotated, np.float32)
    return Rope(head_dim, np.concatenate([inverse, still]) / np.float32(settings.get("factor", 1.0)))


def _yarn(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    theta, original = settings["rope_theta"], settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or longest / original

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = settings.get("attention_factor")
    if scale is None:
        weight, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = magnitude(weight) / magnitude(all_dims) if weight and all_dims else magnitude(1.0)

    def component(rotations: float) -> float:
        """The component that makes this number of rotations within the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(settings.get("beta_fast") or 32), component(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    plain = _plain(theta, dim)
    return Rope(dim, plain / np.float32(factor) * ramp + plain * (1 - ramp), scale)


def _longrope(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    theta = settings["rope_theta"]
    original = settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or longest / original
    scale = settings.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(theta, dim)
    factors = (_factors(settings, key, dim // 2) for key in ("short_factor", "long_factor"))
    short, long = (np.float32(1) / (each * powers) for each in factors)
    if np.array_equal(short, long):
        return Rope(dim, short, scale)
    return Rope(dim, short, scale, long, int(original))


def _factors(settings: Mapping[str, Any], key: str, count: int) -> Frequencies:
    factors = np.array(settings[key], np.float32)
    if factors.shape != (count,):
        raise ValueError(f"'{key}' has {factors.size} factors for {count} frequencies")
    return factors


def _llama3(settings: Mapping[str, Any], head_dim: int, dim: int, longest: int) -> Rope:
    plain = _plain(settings["rope_theta"], dim)
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    original = settings.get("original_max_position_embeddings") or longest
    rotations = np.float32(original) * plain / np.float32(2 * math.pi)
    smooth = ((rotations - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    return Rope(dim, (1 - smooth) * plain / np.float32(factor) + smooth * plain)


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
