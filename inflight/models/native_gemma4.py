"""Gemma 4's layers as native operations (`NativeDecoder`).

Beside what Gemma 3 has: sizes by layer, values with a norm, layers that read another layer's keys and values, an
embedding of its own for each layer, experts beside the MLP, and a factor behind each layer. Source:
models/gemma4/modeling_gemma4.py of huggingface/transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from inflight.kernels import ACTIVATIONS, Activation, Layer, NativeProgram, Norm, Precision, Routing
from inflight.models.config import DecoderConfig
from inflight.models.gemma4_shapes import LayerShape
from inflight.models.weight_loader import WeightLoader


class Take(Protocol):
    """Loads a product: its numbers, several where its tensors have several formats."""

    def __call__(self, name: str, precision: Precision | None, *, gated: bool = False) -> tuple[int, ...]: ...


class Gemma4Layers:
    """Adds the layers' operations to a program.

    Args:
        take: loads products.
        precision: how the layers' weights are packed.
        ropes: numbers of the program's rotations, by name.
        x: the buffer of hidden states.
    """

    def __init__(
        self,
        config: DecoderConfig,
        program: NativeProgram,
        loader: WeightLoader,
        take: Take,
        precision: Precision | None,
        ropes: Mapping[str, int],
        x: int,
    ) -> None:
        assert config.gemma4 is not None
        self._config, self._own = config, config.gemma4
        self._program, self._loader, self._take, self._precision = program, loader, take, precision
        self._ropes, self._x = ropes, x
        self._act = Activation[ACTIVATIONS[config.activation]]
        self._update = program.buffer(config.hidden)
        self._buffers: dict[tuple[str, int], int] = {}
        self._ones: dict[int, int] = {}
        self._embedded = -1  # what the layers' own embeddings give

    def add(self, layers: Sequence[Layer], scale: float) -> None:
        """Adds all layers. Args: scale: of the layers' own embeddings, rounded as they are stored."""
        program, own, config = self._program, self._own, self._config
        if own.own_size:
            self._embedded = program.buffer(own.own_size * config.layers)
            program.multiply(self._x, self._embedded, self._take("own_in", None))
            # The product is scaled by hidden ** -0.5 before its norm; a norm undoes any scale but that of its eps.
            norm = Norm(self._loader.norm(program, "own_norm"), config.eps * config.hidden)
            table = self._loader.table(program, "own_table")
            program.add_table(self._embedded, table, norm, scale=scale, factor=2.0**-0.5)
        for index, (layer, shape) in enumerate(zip(layers, own.shapes, strict=True)):
            if shape.source is not None and own.shapes[index - 1].source is None:
                program.end_unwanted()  # only the first layers have keys and values
            self._attention(index, layer, shape)
            self._mlp(f"{index}.", shape)
            if own.own_size:
                self._own_embedding(index)
            program.scale(self._x, self._loader.array(program, f"{index}.scalar"))

    def _attention(self, index: int, layer: Layer, shape: LayerShape) -> None:
        config, program, name = self._config, self._program, f"{index}."
        queries, own = config.heads * shape.dim, shape.source is None
        number = program.layer(layer)
        qkv = self._buffer("qkv", queries + (2 * shape.kv_heads * shape.dim if own else 0))
        attended = self._buffer("attended", queries)
        program.multiply(
            self._x, qkv, self._take(f"{name}qkv", self._precision), norm=self._norm(f"{name}before_attention")
        )
        q_norm = self._norm(f"{name}q_norm")
        k_norm = self._norm(f"{name}k_norm") if own else q_norm
        rope = config.rope_of[index]
        values = Norm(self._one(shape.dim), config.eps) if own else None
        program.rotate(qkv, number, None if rope is None else self._ropes[rope], (q_norm, k_norm), values)
        program.attend(qkv, attended, number)
        program.multiply(attended, self._update, self._take(f"{name}out", self._precision))
        program.norm(self._update, self._x, self._norm(f"{name}after_attention"), add=True)

    def _mlp(self, name: str, shape: LayerShape) -> None:
        program, x, update = self._program, self._x, self._update
        inner, norm = self._buffer("inner", shape.inner), self._norm(f"{name}before_mlp")
        gate_up = self._take(f"{name}gate_up", self._precision, gated=True)
        program.activated(x, inner, gate_up, self._act, norm=norm)
        program.multiply(inner, update, self._take(f"{name}down", self._precision))
        if self._config.experts is not None:
            update = self._experts(name)
        program.norm(update, x, self._norm(f"{name}after_mlp"), add=True)

    def _experts(self, name: str) -> int:
        """The sum of what the MLP and the experts give, each through its norm: a buffer."""
        config, program, loader = self._config, self._program, self._loader
        experts = config.experts
        assert experts is not None
        both, sparse = self._buffer("both", config.hidden), self._buffer("sparse", config.hidden)
        routed = self._buffer("routed", experts.count)
        program.norm(self._update, both, self._norm(f"{name}after_dense"))
        scale = Norm(loader.array(program, f"{name}router_scale"), config.eps)
        program.multiply(self._x, routed, self._take(f"{name}router", None), norm=scale)
        program.mixture(
            self._x,
            routed,
            [self._take(f"{name}gate_up.{n}", self._precision, gated=True)[0] for n in range(experts.count)],
            [self._take(f"{name}down.{n}", self._precision)[0] for n in range(experts.count)],
            norm=self._norm(f"{name}before_experts"),
            routing=Routing(experts.chosen, normalise=experts.normalise),
            act=self._act,
            into=sparse,
            factors=loader.array(program, f"{name}expert_factors"),
        )
        program.norm(sparse, both, self._norm(f"{name}after_experts"), add=True)
        return both

    def _own_embedding(self, index: int) -> None:
        program, name, size = self._program, f"{index}.", self._own.own_size
        gate = self._buffer("own", size)
        program.multiply(self._x, gate, self._take(f"{name}own_gate", self._precision))
        program.gate_by(self._embedded, index * size, gate, self._act)
        program.multiply(gate, self._update, self._take(f"{name}own_out", self._precision))
        program.norm(self._update, self._x, self._norm(f"{name}after_own"), add=True)

    def _norm(self, name: str) -> Norm:
        return Norm(self._loader.norm(self._program, name), self._config.eps)

    def _one(self, width: int) -> int:
        """The weight of a norm without one."""
        if width not in self._ones:
            self._ones[width] = self._program.weight(np.ones(width, np.float32))
        return self._ones[width]

    def _buffer(self, kind: str, width: int) -> int:
        """Layers of one size share their buffers."""
        if (kind, width) not in self._buffers:
            self._buffers[kind, width] = self._program.buffer(width)
        return self._buffers[kind, width]
