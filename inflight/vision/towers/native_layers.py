"""The layers of vision transformers: pre-norm, attention in both directions, an MLP with or without a gate."""

from __future__ import annotations

from dataclasses import dataclass

from inflight.kernels import Activation, TowerNorm
from inflight.vision.towers.native_parts import Parts


@dataclass(frozen=True)
class LayerForm:
    """What a family calls the weights of a layer, and what it has.

    Attributes:
        norms: in front of attention and of the MLP.
        qkv: queries, keys and values; one name if they are stored as one.
        out: of attention.
        up: of the MLP: one name, or those of a gate and of what it multiplies.
        down: of the MLP.
        rms: the norms are RMSNorms.
        qkv_bias, bias: of queries, keys and values; of all other products.
        scales: of each channel of what attention and the MLP add (layer scale).
    """

    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    rms: bool = False
    qkv_bias: bool = True
    bias: bool = True
    scales: tuple[str, str] | None = None


@dataclass(frozen=True)
class Sizes:
    """A layer's sizes; `eps` is that of its norms."""

    hidden: int
    inner: int
    heads: int
    eps: float

    @property
    def dim(self) -> int:
        return self.hidden // self.heads


class Layers:
    """Adds layers to a tower's program; they share the buffers between their operations.

    Args:
        parts: of the tower.
        states: the buffer of the hidden states.
        form: of each layer.
        sizes: of each layer.
        act: of the MLP.
    """

    def __init__(self, parts: Parts, states: int, form: LayerForm, sizes: Sizes, act: Activation) -> None:
        self._parts, self._states, self._form, self._sizes, self._act = parts, states, form, sizes, act
        buffer = parts.program.buffer
        self._qkv, self._attended, self._inner = buffer(3 * sizes.hidden), buffer(sizes.hidden), buffer(sizes.inner)

    def add(self, name: str, *, angles: int | None = None, partition: int = 0) -> None:
        """Adds the layer whose weights' names begin with `name`.

        Args:
            angles: the run's array of cosines and sines; None: no rotation.
            partition: the run's partition of rows that see each other.
        """
        parts, form, sizes = self._parts, self._form, self._sizes
        program, hidden, inner = parts.program, sizes.hidden, sizes.inner
        rows = 3 * hidden // len(form.qkv)
        products = [parts.product(f"{name}{key}", [rows, hidden], bias=form.qkv_bias) for key in form.qkv]
        program.multiply(self._states, self._qkv, products, norm=self._norm(f"{name}{form.norms[0]}"))
        if angles is not None:
            program.rotate(self._qkv, sizes.heads, angles)
        program.attend(self._qkv, self._attended, sizes.heads, float(sizes.dim**-0.5), partition)
        self._join(name, form.out, 0, self._attended, hidden)
        norm = self._norm(f"{name}{form.norms[1]}")
        if len(form.up) == 1:
            up = parts.product(f"{name}{form.up[0]}", [inner, hidden], bias=form.bias)
            program.multiply(self._states, self._inner, up, norm=norm, act=self._act)
        else:
            up = parts.gated([f"{name}{key}" for key in form.up], [inner, hidden], bias=form.bias)
            program.multiply(self._states, self._inner, up, norm=norm, gate=self._act)
        self._join(name, form.down, 1, self._inner, inner)

    def _join(self, name: str, key: str, which: int, source: int, width: int) -> None:
        """states += a product of source."""
        parts, form, hidden = self._parts, self._form, self._sizes.hidden
        factor = None if form.scales is None else parts.floats(f"{name}{form.scales[which]}", [hidden])
        product = parts.product(f"{name}{key}", [hidden, width], bias=form.bias, factor=factor)
        parts.program.multiply(source, self._states, product, add=True)

    def _norm(self, name: str) -> TowerNorm:
        return self._parts.norm(name, self._sizes.hidden, self._sizes.eps, bias=not self._form.rms)
