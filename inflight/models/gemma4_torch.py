"""Gemma 4's layers on torch's operators, or a rank's share of them; `native_gemma4.py` has them on the CPU engine.

Ranks split heads, the MLP's columns and those of the experts. What is small is on every rank: routers, the layers' own
embeddings with their products, norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inflight.device import Ranks
from inflight.models.decoder import Decoder, Linear, Part
from inflight.models.on_torch import TensorBatch
from inflight.nn import AttentionBackend, AttentionSpec, CosSin, Gate, RmsNorm, Rotation, activation, to_tensor
from inflight.tensors import Blocks, Quantised, Weight

Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of a step's tokens, by layer."""


@dataclass(frozen=True)
class Gemma4Attention:
    """As `decoder.Attention`, with a norm of values.

    Attributes:
        index: of the layer.
        source: the layer whose keys and values this one reads; None: its own.
    """

    index: int
    source: int | None
    spec: AttentionSpec
    qkv: Linear
    out: Linear
    rope: str
    q_norm: RmsNorm
    k_norm: RmsNorm | None
    v_norm: RmsNorm
    ranks: Ranks

    def __call__(
        self,
        x: torch.Tensor,
        ropes: dict[str, Rotation],
        cos_sin: dict[str, CosSin],
        attention: AttentionBackend,
        batch: TensorBatch,
        kept: Kept,
    ) -> torch.Tensor:
        spec, rope, angles = self.spec, ropes[self.rope], cos_sin[self.rope]
        heads = self.qkv(x).unflatten(-1, (-1, spec.head_dim))
        q = rope.apply(self.q_norm(heads[:, : spec.num_heads]), angles)
        if self.source is None:
            assert self.k_norm is not None
            keys, values = heads[:, spec.num_heads :].chunk(2, dim=1)
            kept[self.index] = rope.apply(self.k_norm(keys), angles), self.v_norm(values)
        # A layer that shares writes the same keys and values to their slots again.
        k, v = kept[self.index if self.source is None else self.source]
        out = attention.forward(spec, batch.attention, q, k, v)
        return self.ranks.all_reduce(self.out(out.flatten(1)))


@dataclass(frozen=True)
class Gemma4Experts:
    """The experts beside an MLP, with their norms.

    Attributes:
        chosen: experts that a token takes.
        factors: float32 [experts], of their weights.
        scale: of the router's input, [hidden].
    """

    chosen: int
    router: Linear
    scale: RmsNorm
    factors: torch.Tensor
    gate_up: list[Linear]
    down: list[Linear]
    act: Gate
    after_dense: RmsNorm
    before: RmsNorm
    after: RmsNorm
    ranks: Ranks

    def __call__(self, x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(self.router(self.scale(x)).float(), dim=-1)
        weights, chosen = torch.topk(chances, self.chosen, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True) * self.factors[chosen]).to(x.dtype)
        inputs, out = self.before(x), torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            tokens, place = torch.nonzero(chosen == expert, as_tuple=True)
            gate, up = self.gate_up[expert](inputs[tokens]).chunk(2, dim=-1)
            out.index_add_(0, tokens, self.down[expert](self.act(gate, up)) * weights[tokens, place].unsqueeze(1))
        return self.after_dense(dense) + self.after(self.ranks.all_reduce(out))


@dataclass(frozen=True)
class OwnInput:
    """What a layer makes of its own embedding."""

    gate: Linear
    out: Linear
    norm: RmsNorm


@dataclass(frozen=True)
class Gemma4Layer:
    """Attributes: scalar: [1], the factor behind the layer."""

    attention: Gemma4Attention
    mlp: Part
    experts: Gemma4Experts | None
    own: OwnInput | None
    before_attention: RmsNorm
    before_mlp: RmsNorm
    after_attention: RmsNorm
    after_mlp: RmsNorm
    scalar: torch.Tensor


@dataclass(frozen=True)
class OwnTable:
    """The layers' own embeddings.

    Attributes:
        table: [vocabulary, layers * size], where it lies in the file.
        scale: of its rows.
        norm: of each layer's part, [size].
    """

    table: Weight
    scale: float
    product: Linear
    norm: RmsNorm
    layers: int

    def __call__(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, layers, size] of the tokens' embeddings x [T, hidden]."""
        parts = self.norm(self.product(x).unflatten(-1, (self.layers, -1)))
        rows = to_tensor(_rows(self.table, tokens.cpu().numpy())).to(x.device, x.dtype)
        scale = torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        return (parts + (rows * scale).view_as(parts)) * 2.0**-0.5


class Gemma4Decoder(Decoder):
    """Gemma 4's language part. `load_decoder` makes it."""

    def give(self, layers: Sequence[Gemma4Layer], own: OwnTable | None) -> None:
        """Sets the layers; those with keys and values of their own have caches."""
        self._parts, self._own = layers, own
        self.layers = [layer.attention.spec for layer in layers if layer.attention.source is None]

    def run_layers(
        self, x: torch.Tensor, cos_sin: dict[str, CosSin], batch: TensorBatch, given: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        attention, act = self._attention, activation(self._config.activation)
        assert attention is not None
        kept: Kept = {}
        embedded = None if self._own is None else self._own(batch.token_ids, x)
        for index, layer in enumerate(self._parts):
            y = layer.attention(layer.before_attention(x), self._ropes, cos_sin, attention, batch, kept)
            x = x + layer.after_attention(y)
            y = layer.mlp(layer.before_mlp(x))
            if layer.experts is not None:
                y = layer.experts(x, y)
            x = x + layer.after_mlp(y)
            if layer.own is not None and embedded is not None:
                gate = act(layer.own.gate(x)) * embedded[:, index]
                x = x + layer.own.norm(layer.own.out(gate))
            x = x * layer.scalar
        return x


def _rows(table: Weight, tokens: np.ndarray) -> np.ndarray:
    """Rows of a table as floats."""
    if isinstance(table, Blocks):
        return Blocks(table.type, (len(tokens), table.shape[1]), table.data[tokens]).dequantise()
    if isinstance(table, Quantised):
        offsets = None if table.offsets is None else table.offsets[tokens]
        return Quantised(table.bits, table.group, table.codes[tokens], table.scales[tokens], offsets).dequantise()
    rows: np.ndarray = table[tokens]
    return rows
