"""The parts of decoder layers: norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from inflight.errors import StartError

Activation = Callable[[torch.Tensor], torch.Tensor]
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What an MLP makes of its gate and its up, both [..., n]."""


@dataclass(frozen=True)
class RmsNorm:
    """Root mean square norm (Zhang and Sennrich, 2019) over the last dimension, computed in float32.

    Attributes:
        weight: [n].
        centered: the weight is stored as its distance from 1, and applied before rounding (Gemma).
    """

    weight: torch.Tensor
    eps: float
    centered: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.centered:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True)
class EvenNorm:
    """Layer norm (Ba et al., 2016) without a bias over the last dimension, computed in float32."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return F.layer_norm(wide, wide.shape[-1:], self.weight.float(), None, self.eps).to(x.dtype)


def xielu(squares: float, exponentials: float, linear: float) -> Activation:
    """xIELU (Huang and Schlag, 2024): squares * x² + linear * x above 0, and below
    (exponentials + linear) * (e ** x - 1 - x) + linear * x."""

    def act(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        below = wide.clamp(max=0.0)
        curve = squares * wide.clamp(min=0.0).square() + (exponentials + linear) * (torch.expm1(below) - below)
        return (curve + linear * wide).to(x.dtype)

    return act


def activation(name: str) -> Activation:
    """The function of that name in configs.

    Raises:
        StartError: an unknown name.
    """
    try:
        return _ACTIVATIONS[name]
    except KeyError:
        raise StartError(f"activation '{name}' is unknown; known are {', '.join(_ACTIVATIONS)}") from None


def gating(name: str) -> Gate:
    """act(gate) * up for the activation of that name, and gpt-oss's `swiglu_clamped`.

    Raises:
        StartError: an unknown name.
    """
    if name == "swiglu_clamped":
        return _swiglu_clamped
    act = activation(name)
    return lambda gate, up: act(gate) * up


def _swiglu_clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Source: GptOssExperts of huggingface/transformers."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu_squared,
}
