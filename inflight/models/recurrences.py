"""Layers with a recurrent state: what a config.json says of them."""

from __future__ import annotations

from dataclasses import dataclass

from inflight.kernels import Delta, Mamba, RecurrentLayer, ShortConv


@dataclass(frozen=True)
class DeltaNet:
    """Layers with a gated delta rule in place of attention (Qwen3-Next, Qwen3.5).

    Attributes:
        layers: which layers these are.
        shape: of one of them.
        joined: the products of queries, keys, values and z are one tensor, key head by key head (Qwen3-Next).
        joined_rates: those of β and the decays are another.
    """

    layers: tuple[bool, ...]
    shape: Delta
    joined: bool = False
    joined_rates: bool = False

    @property
    def kernel(self) -> RecurrentLayer:
        """One of these layers."""
        return self.shape


@dataclass(frozen=True)
class ConvNet:
    """Layers with a gated short convolution (LFM2).

    Attributes:
        layers: which layers these are.
        channels, taps: see `inflight.kernels.ShortConv`.
        bias: the convolution and the products have one.
    """

    layers: tuple[bool, ...]
    channels: int
    taps: int
    bias: bool = False

    @property
    def kernel(self) -> RecurrentLayer:
        """One of these layers."""
        return ShortConv(self.channels, self.taps)


@dataclass(frozen=True)
class StateSpace:
    """Layers with a selective state space (Mamba 2).

    Attributes:
        layers: which layers these are.
        shape: see `inflight.kernels.Mamba`.
        conv_bias, in_bias, out_bias: the convolution and the products before and behind have one.
        conv_scales: factors of the convolution's columns, of x, B and C.
    """

    layers: tuple[bool, ...]
    shape: Mamba
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    conv_scales: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def kernel(self) -> RecurrentLayer:
        """One of these layers."""
        return self.shape


Recurrence = DeltaNet | ConvNet | StateSpace
