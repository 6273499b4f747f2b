"""Gemma 4's tower: patches with positions and rotations on two axes, norms around attention and MLP, products whose
inputs and outputs the smaller models hold within limits, and means of squares of patches. Source:
models/gemma4/modeling_gemma4.py of huggingface/transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.kernels import TowerArrays, TowerNorm
from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.native_parts import (
    Indices,
    NativeSettings,
    Parts,
    activation,
    axial_angles,
    blocks,
    field,
    number,
    patches,
)

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10 * 1024,
}
"""What a config may leave out."""
THETA = 100.0
FREE = (-math.inf, math.inf)


class Gemma4Tower(Tower):
    """Arrays: patches, what is added to them, angles. Table 0: patches whose mean is a token.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        vision = {**DEFAULTS, **field(config, "vision_config")}
        self._parts = parts = Parts(weights, settings)
        self._prefix = prefix = parts.prefix("patch_embedder.input_proj.weight")
        self._hidden, self._patch = number(vision, "hidden_size"), number(vision, "patch_size")
        self._merge, self._dim = number(vision, "pooling_kernel_size"), number(vision, "head_dim")
        if self._dim % 4:
            raise StartError(f"config.json: heads of {self._dim} values do not divide into two axes of pairs")
        self._theta = float((vision.get("rope_parameters") or {}).get("rope_theta", THETA))
        self._eps = float(vision["rms_norm_eps"])
        program, hidden = parts.program, self._hidden
        cut, states = program.buffer(3 * self._patch**2), program.buffer(hidden)
        program.read(cut, 0)
        program.read(states, 1)
        program.multiply(cut, states, self._patching(), add=True)
        shape = [2, number(vision, "position_embedding_size"), hidden]
        self._table = parts.floats(f"{prefix}patch_embedder.position_embedding_table", shape)
        layer = _Layer(parts, vision, states)
        for index in range(number(vision, "num_hidden_layers")):
            layer.add(f"{prefix}encoder.layers.{index}.")
        self._join(states, bool(vision.get("standardize")), number(field(config, "text_config"), "hidden_size"))
        self._program, self.identity = program, parts.identity
        del self._parts  # and with it the checkpoint

    def _patching(self) -> int:
        """The product of patches. The checkpoint has a pixel's colours side by side, a GGUF file has them apart."""
        name, side = f"{self._prefix}patch_embedder.input_proj.weight", self._patch
        if len(self._parts.weights.shape(name) or []) == 4:
            weight = self._parts.floats(name, [self._hidden, 3, side, side])
        else:
            weight = self._parts.floats(name, [self._hidden, 3 * side**2])
            weight = weight.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        return self._parts.pack(np.ascontiguousarray(weight.reshape(self._hidden, -1)), None)

    def _join(self, states: int, standardised: bool, width: int) -> None:
        """Adds the means of patches, in larger models standardised (less `std_bias`, times `std_scale`), a norm and
        a product."""
        parts, program, hidden = self._parts, self._parts.program, self._hidden
        means, rows = program.buffer(hidden, 1), program.buffer(width, 1)
        program.average(states, means, self._merge**2, 0)
        eps = self._eps / hidden  # a norm undoes any factor but that of its epsilon
        if standardised:
            eps = self._eps
            bias, scale = (parts.floats(f"{self._prefix}std_{kind}", [hidden]) for kind in ("bias", "scale"))
            root = program.weight(np.full(hidden, hidden**0.5, np.float32))
            program.adjust(means, means, hidden, factors=root, terms=program.weight(-bias))
            program.adjust(means, means, hidden, factors=program.weight(scale))
        norm = TowerNorm(program.weight(np.ones(hidden, np.float32)), None, eps)
        name = parts.prefix("embed_vision.embedding_projection.weight") + "embed_vision.embedding_projection"
        product = parts.product(name, [width, hidden], bias=False, layer=False)
        program.multiply(means, rows, product, norm=norm)
        program.output(rows)

    def run(self, prepared: Prepared) -> TowerOutput:
        [pixels] = prepared.pixels
        rows, columns = (side // self._patch for side in pixels.shape[1:])
        row, column = np.divmod(np.arange(rows * columns), columns)
        table = blocks(rows, columns, self._merge)
        cut = patches(2 * (pixels - np.float32(0.5)), self._patch)
        angles = axial_angles(column, row, self._dim, self._theta)
        arrays = [cut, self._table[0][column] + self._table[1][row], angles]
        count = rows * columns
        return TowerOutput(self._program.run(TowerArrays([count, len(table)], arrays, [[count]], [table]))[0])


class _Layer:
    """Adds layers to a tower's program; they share their buffers.

    Args:
        vision: settings.
        states: the buffer of the hidden states.
    """

    def __init__(self, parts: Parts, vision: dict[str, Any], states: int) -> None:
        self._parts, self._program, self._states = parts, parts.program, states
        self._heads, self._kv_heads = number(vision, "num_attention_heads"), number(vision, "num_key_value_heads")
        self._hidden, self._inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
        self._dim, self._eps = number(vision, "head_dim"), float(vision["rms_norm_eps"])
        self._act = activation(str(vision["hidden_activation"]))
        self._limited = bool(vision.get("use_clipped_linears"))
        buffer, queries = self._program.buffer, self._heads * self._dim
        self._sizes = (queries, self._kv_heads * self._dim, self._kv_heads * self._dim)
        self._qkv, self._attended = buffer(sum(self._sizes)), buffer(queries)
        self._normed, self._given, self._update = buffer(self._hidden), buffer(self._inner), buffer(self._hidden)
        if self._limited:
            self._several, self._both = buffer(3 * self._hidden), buffer(2 * self._inner)
        self._one = self._program.weight(np.ones(self._dim, np.float32))

    def add(self, name: str) -> None:
        """Adds the layer whose weights' names begin with `name`."""
        program = self._program
        halves = _halves(self._dim)
        orders = [self._order(halves, self._heads), self._order(halves, self._kv_heads), None]
        names = [f"{name}self_attn.{part}_proj" for part in "qkv"]
        norm = self._norm(f"{name}input_layernorm", self._hidden)
        self._multiply(names, self._sizes, norm, self._qkv, orders)
        norms = [self._head_norm(f"{name}self_attn.{part}_norm", halves) for part in "qk"]
        norms.append(TowerNorm(self._one, None, self._eps))
        program.rotate(self._qkv, self._heads, 2, self._kv_heads, norms)
        program.attend(self._qkv, self._attended, self._heads, 1.0, kv_heads=self._kv_heads)
        self._out(f"{name}self_attn.o_proj", self._attended, f"{name}post_attention_layernorm")
        norm = self._norm(f"{name}pre_feedforward_layernorm", self._hidden)
        names = [f"{name}mlp.{part}_proj" for part in ("gate", "up")]
        if self._limited:
            self._multiply(names, (self._inner, self._inner), norm, self._both)
            program.gate(self._both, self._given, self._act)
        else:
            linear = [f"{each}.linear" for each in names]
            product = self._parts.gated(linear, [self._inner, self._hidden], bias=False)
            program.multiply(self._states, self._given, product, norm=norm, gate=self._act)
        self._out(f"{name}mlp.down_proj", self._given, f"{name}post_feedforward_layernorm")

    def _multiply(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        norm: TowerNorm,
        to: int,
        orders: Sequence[Indices | None] = (None, None),
    ) -> None:
        """to = products of the normed states, side by side, each within its own limits."""
        program, hidden = self._program, self._hidden
        products = [
            self._parts.product(f"{name}.linear", [size, hidden], bias=False, order=order)
            for name, size, order in zip(names, sizes, orders)
        ]
        if not self._limited:
            program.multiply(self._states, to, products, norm=norm)
            return
        program.norm(self._states, self._normed, norm)
        for place, name in enumerate(names):
            limits = self._limits(name, "input")
            program.adjust(self._normed, self._several, hidden, column=place * hidden, limits=limits)
        program.multiply(self._several, to, products, column=0)
        column = 0
        for name, size in zip(names, sizes):
            limits = self._limits(name, "output")
            program.adjust(to, to, size, from_column=column, column=column, limits=limits)
            column += size

    def _out(self, name: str, source: int, norm: str) -> None:
        """states += norm(a product of source)."""
        program, width = self._program, self._heads * self._dim if source == self._attended else self._inner
        product = self._parts.product(f"{name}.linear", [self._hidden, width], bias=False)
        if self._limited:
            program.adjust(source, source, width, limits=self._limits(name, "input"))
        program.multiply(source, self._update, product)
        if self._limited:
            program.adjust(self._update, self._update, self._hidden, limits=self._limits(name, "output"))
        program.norm(self._update, self._states, self._norm(norm, self._hidden), add=True)

    def _limits(self, name: str, kind: str) -> tuple[float, float]:
        """The least and the largest value of a product's inputs or outputs; a checkpoint may leave them out."""
        names = [f"{name}.{kind}_{end}" for end in ("min", "max")]
        if not all(each in self._parts.weights for each in names):
            return FREE
        least, most = (float(self._parts.floats(each, []).reshape(())) for each in names)
        return least, most

    def _norm(self, name: str, width: int) -> TowerNorm:
        return self._parts.norm(name, width, self._eps, bias=False)

    def _head_norm(self, name: str, order: Indices) -> TowerNorm:
        weight = self._parts.floats(f"{name}.weight", [self._dim])[order]
        return TowerNorm(self._program.weight(weight), None, self._eps)

    def _order(self, halves: Indices, heads: int) -> Indices:
        """The order of all rows of a product of heads."""
        return (np.arange(heads)[:, None] * self._dim + halves).reshape(-1)


def _halves(dim: int) -> Indices:
    """The order of a head's components in which pairs are half of it apart: the checkpoint has both halves of an axis
    side by side, first the columns' and then the rows'."""
    return np.ascontiguousarray(np.arange(dim).reshape(2, 2, dim // 4).transpose(1, 0, 2)).reshape(-1)
