"""The tensors of recurrent layers.

Layer n has the products n.mixer_in, n.mixer_rates and n.mixer_out. The first two give the columns that the layer
reads, side by side: n.mixer_rates gives decays, steps and the like, whose products stay floats; a gated short
convolution has none. Its arrays stay float32: those of n.conv, n.conv_bias, n.decay, n.dt_bias, n.skip, n.mixer_norm
that `array_names` has. Several ranks do not divide these layers.
"""

from __future__ import annotations

import numpy as np

from inflight.checkpoint import Slice
from inflight.models.pieces import Piece, Product, by_head
from inflight.models.recurrences import ConvNet, DeltaNet, Recurrence, StateSpace
from inflight.tensors import Floats


def array_names(recurrence: Recurrence) -> tuple[str | None, ...]:
    """The arrays that `NativeProgram.recurrent` wants, in its order; None: the layers do not have it."""
    if isinstance(recurrence, DeltaNet):
        return ("conv", "decay", "dt_bias", "mixer_norm")
    if isinstance(recurrence, ConvNet):
        return ("conv", "conv_bias" if recurrence.bias else None)
    bias, norm = "conv_bias" if recurrence.conv_bias else None, "mixer_norm" if recurrence.shape.normed else None
    return ("conv", bias, "decay", "dt_bias", "skip", norm)


def recurrent_array(recurrence: Recurrence, prefix: str, kind: str) -> Piece:
    """Args: prefix: of the layer's names."""
    if isinstance(recurrence, DeltaNet):
        delta = recurrence.shape
        heads, taps, channels, norm, module = (
            delta.value_heads,
            delta.taps,
            delta.channels,
            delta.value_dim,
            "linear_attn",
        )
    elif isinstance(recurrence, ConvNet):
        stored, shape = ("weight", (recurrence.channels, 1, recurrence.taps)), ("bias", (recurrence.channels,))
        name, size = stored if kind == "conv" else shape
        return Piece(f"{prefix}conv.conv.{name}", size)
    else:
        of = recurrence.shape
        heads, taps, channels, norm, module = of.heads, of.taps, of.channels, of.values, "mamba"
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv": ("conv1d.weight", (channels, 1, taps)),
        "conv_bias": ("conv1d.bias", (channels,)),
        "decay": ("A_log", (heads,)),
        "dt_bias": ("dt_bias", (heads,)),
        "skip": ("D", (heads,)),
        "mixer_norm": ("norm.weight", (norm,)),
    }
    own, shape_of = found[kind]
    return Piece(f"{prefix}{module}.{own}", shape_of)


def conv_factors(recurrence: Recurrence | None) -> Floats | None:
    """What the convolution's weights of each channel are multiplied with, float32 [channels]; None: nothing."""
    if not isinstance(recurrence, StateSpace) or recurrence.conv_scales == (1.0, 1.0, 1.0):
        return None
    shared = recurrence.shape.groups * recurrence.shape.state
    return np.repeat(np.array(recurrence.conv_scales, np.float32), (recurrence.shape.values, shared, shared))


def recurrent_product(recurrence: Recurrence, hidden: int, prefix: str, kind: str) -> Product:
    """Args: prefix: of the layer's names."""
    if isinstance(recurrence, DeltaNet):
        return _delta(recurrence, hidden, f"{prefix}linear_attn.", kind)
    if isinstance(recurrence, ConvNet):
        channels = recurrence.channels
        name, shape = ("out_proj", (hidden, channels)) if kind == "mixer_out" else ("in_proj", (3 * channels, hidden))
        biases = (Piece(f"{prefix}conv.{name}.bias", shape[:1]),) if recurrence.bias else ()
        return Product((Piece(f"{prefix}conv.{name}.weight", shape),), biases)
    return _mamba(recurrence, hidden, f"{prefix}mamba.", kind)


def _mamba(space: StateSpace, hidden: int, prefix: str, kind: str) -> Product:
    of = space.shape
    if kind == "mixer_out":
        biases = (Piece(f"{prefix}out_proj.bias", (hidden,)),) if space.out_bias else ()
        return Product((Piece(f"{prefix}out_proj.weight", (hidden, of.values)),), biases)
    first = of.width - of.heads
    part = Slice(0, 0, first) if kind == "mixer_in" else Slice(0, first, of.width)
    biases = (Piece(f"{prefix}in_proj.bias", (of.width,), part),) if space.in_bias else ()
    return Product((Piece(f"{prefix}in_proj.weight", (of.width, hidden), part),), biases)


def _delta(net: DeltaNet, hidden: int, prefix: str, kind: str) -> Product:
    delta, values = net.shape, net.shape.values
    if kind == "mixer_out":
        return Product((Piece(f"{prefix}out_proj.weight", (hidden, values)),))
    rates = kind == "mixer_rates"
    if not (net.joined_rates if rates else net.joined):
        parts = (
            (("in_proj_b", delta.value_heads), ("in_proj_a", delta.value_heads))
            if rates
            else (("in_proj_qkv", delta.channels), ("in_proj_z", values))
        )
        return Product(tuple(Piece(f"{prefix}{name}.weight", (rows, hidden)) for name, rows in parts))
    shared = delta.value_heads // delta.key_heads
    own = shared * delta.value_dim
    sizes = (shared, shared) if rates else (delta.key_dim, delta.key_dim, own, own)
    name = f"{prefix}{'in_proj_ba' if rates else 'in_proj_qkvz'}.weight"
    return Product(by_head(name, hidden, delta.key_heads, sizes))
