"""The towers of Qwen3-VL, Qwen3.5 and Qwen2.5-VL: patches with rotations on two axes, merged four by four."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.errors import StartError
from inflight.kernels import Activation, TowerArrays
from inflight.tensors import Floats
from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.native_layers import LayerForm, Layers, Sizes
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

QWEN3 = LayerForm(("norm1", "norm2"), ("attn.qkv",), "attn.proj", ("mlp.linear_fc1",), "mlp.linear_fc2")
QWEN25 = LayerForm(
    ("norm1", "norm2"), ("attn.qkv",), "attn.proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", rms=True
)
EPS = 1e-6
EVERYWHERE, IN_WINDOWS = 0, 1


@dataclass(frozen=True)
class Shape:
    """What both families' configs say, under the same names."""

    sizes: Sizes
    patch: int
    merge: int
    depth: int
    out: int
    theta: float


class QwenTower(Tower):
    """Arrays: patches, what is added to them, angles. Table 0: patches that a token is merged of.

    Args:
        config: the checkpoint's.
        weights: of the checkpoint.
        settings: how it is computed.
    """

    defaults: dict[str, Any]

    def __init__(self, config: dict[str, Any], weights: Weights, settings: NativeSettings) -> None:
        self._vision = vision = {**self.defaults, **field(config, "vision_config")}
        heads, hidden = number(vision, "num_heads"), number(vision, "hidden_size")
        sizes = Sizes(hidden, number(vision, "intermediate_size"), heads, EPS)
        theta = float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0))
        self._shape = shape = Shape(
            sizes,
            number(vision, "patch_size"),
            number(vision, "spatial_merge_size"),
            number(vision, "depth"),
            number(vision, "out_hidden_size"),
            theta,
        )
        if sizes.dim % 4:
            raise StartError(f"config.json: heads of {sizes.dim} values do not divide into two axes of pairs")
        self._parts = parts = Parts(weights, settings)
        self._prefix = parts.prefix("patch_embed.proj.weight")
        program = parts.program
        channels = int(field(vision, "in_channels", 3))
        cut, self._states = program.buffer(channels * shape.patch**2), program.buffer(hidden)
        self._wide = program.buffer(hidden * shape.merge**2, 1), program.buffer(hidden * shape.merge**2, 1)
        program.read(cut, 0)
        program.read(self._states, 1)
        frames = [hidden, channels, number(vision, "temporal_patch_size"), shape.patch, shape.patch]
        program.multiply(cut, self._states, self._patching(frames), add=True)
        self._build()
        self._program, self.identity = program, parts.identity
        del self._parts  # and with it the checkpoint

    def _patching(self, shape: list[int]) -> int:
        """The product of one frame: a picture is a film of equal frames, whose weights add up."""
        weight = self._parts.floats(f"{self._prefix}patch_embed.proj.weight", shape).sum(axis=2)
        bias = f"{self._prefix}patch_embed.proj.bias"
        held = self._parts.floats(bias, shape[:1]) if bias in self._parts.weights else None
        return self._parts.pack(weight.reshape(shape[0], -1), held)

    @abstractmethod
    def _build(self) -> None:
        """Adds the layers and what joins them to the language model."""

    def _mlp(self, wide: int, first: str, second: str, norm: Any = None) -> None:
        """Two products with GELU between them make an output of merged rows."""
        parts, (_, inner), width = self._parts, self._wide, self._shape.sizes.hidden * self._shape.merge**2
        out = parts.program.buffer(self._shape.out, 1)
        product = parts.product(f"{self._prefix}{first}", [width, width], layer=False)
        parts.program.multiply(wide, inner, product, norm=norm, act=Activation.GELU)
        product = parts.product(f"{self._prefix}{second}", [self._shape.out, width], layer=False)
        parts.program.multiply(inner, out, product)
        parts.program.output(out)

    def run(self, prepared: Prepared) -> TowerOutput:
        [pixels] = prepared.pixels
        shape = self._shape
        rows, columns = (side // shape.patch for side in pixels.shape[1:])
        order = blocks(rows, columns, shape.merge)
        tokens, windows = self._windows(rows // shape.merge, columns // shape.merge)
        order = order[tokens]  # [tokens, patches of a token], as they are computed
        places = np.empty(len(tokens), np.int64)
        places[tokens] = np.arange(len(tokens))
        table = places[:, None] * shape.merge**2 + np.arange(shape.merge**2)
        at = order.reshape(-1)
        angles = axial_angles(at // columns, at % columns, shape.sizes.dim, shape.theta)
        arrays = [patches(pixels, shape.patch)[at], self._positions(rows, columns)[at], angles]
        partitions = [[rows * columns], [count * shape.merge**2 for count in windows]]
        out = self._program.run(TowerArrays([rows * columns, len(tokens)], arrays, partitions, [table]))
        return TowerOutput(out[-1], tuple(out[:-1]))

    def _windows(self, rows: int, columns: int) -> tuple[Indices, list[int]]:
        """The order in which tokens are computed, and how many each window has."""
        return np.arange(rows * columns), [rows * columns]

    def _positions(self, rows: int, columns: int) -> Floats:
        """What is added to each patch [rows * columns, hidden]."""
        return np.zeros((rows * columns, self._shape.sizes.hidden), np.float32)


class Qwen3Tower(QwenTower):
    """Qwen3-VL's: learned positions, interpolated; states of some layers go to the language model too (deepstack)."""

    defaults = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }

    def _build(self) -> None:
        parts, shape, prefix, vision = self._parts, self._shape, self._prefix, self._vision
        program, hidden, (wide, _) = parts.program, shape.sizes.hidden, self._wide
        self._side = int(number(vision, "num_position_embeddings") ** 0.5)
        self._table = parts.floats(f"{prefix}pos_embed.weight", [number(vision, "num_position_embeddings"), hidden])
        act = activation(str(field(vision, "hidden_act", "gelu_pytorch_tanh")))
        layers = Layers(parts, self._states, QWEN3, shape.sizes, act)
        deep = list(field(vision, "deepstack_visual_indexes", []))
        for index in range(shape.depth):
            layers.add(f"{prefix}blocks.{index}.", angles=2)
            if index not in deep:
                continue
            name = f"deepstack_merger_list.{deep.index(index)}"
            program.gather(self._states, wide, 0)
            norm = parts.norm(f"{prefix}{name}.norm", hidden * shape.merge**2, EPS)
            self._mlp(wide, f"{name}.linear_fc1", f"{name}.linear_fc2", norm)
        normed = program.buffer(hidden)
        program.norm(self._states, normed, parts.norm(f"{prefix}merger.norm", hidden, EPS))
        program.gather(normed, wide, 0)
        self._mlp(wide, "merger.linear_fc1", "merger.linear_fc2")

    def _positions(self, rows: int, columns: int) -> Floats:
        """Bilinear between the learned ones, whose corners are the picture's."""
        (low, high, high_share), (left, right, right_share) = taps(rows, self._side), taps(columns, self._side)
        grid = self._table.reshape(self._side, self._side, -1)
        low_share, left_share = (1 - share for share in (high_share, right_share))
        out = np.zeros((rows, columns, grid.shape[2]), np.float32)
        for row, row_share in ((low, low_share), (high, high_share)):
            for column, column_share in ((left, left_share), (right, right_share)):
                out += grid[row[:, None], column[None, :]] * (row_share[:, None] * column_share[None, :])[:, :, None]
        return out.reshape(rows * columns, -1)


class Qwen35Tower(Qwen3Tower):
    """Qwen3.5's: Qwen3-VL's without the states for other layers of the language model."""

    defaults = {**Qwen3Tower.defaults, "deepstack_visual_indexes": []}


def taps(count: int, side: int) -> tuple[Indices, Indices, Floats]:
    """Of each of `count` places on an axis: the neighbours among `side` learned ones, and the second one's share."""
    at = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
    low = np.floor(at)
    below = low.astype(np.int64)
    return below, np.minimum(below + 1, side - 1), at - low


class Qwen25Tower(QwenTower):
    """Qwen2.5-VL's: most layers attend within windows."""

    defaults = {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }

    def _build(self) -> None:
        parts, shape, prefix, vision = self._parts, self._shape, self._prefix, self._vision
        program, hidden, (wide, _) = parts.program, shape.sizes.hidden, self._wide
        act = activation(str(field(vision, "hidden_act", "silu")))
        layers = Layers(parts, self._states, QWEN25, shape.sizes, act)
        everywhere = list(field(vision, "fullatt_block_indexes"))
        for index in range(shape.depth):
            partition = EVERYWHERE if index in everywhere else IN_WINDOWS
            layers.add(f"{prefix}blocks.{index}.", angles=2, partition=partition)
        normed = program.buffer(hidden)
        program.norm(self._states, normed, parts.norm(f"{prefix}merger.ln_q", hidden, EPS, bias=False))
        program.gather(normed, wide, 0)
        self._mlp(wide, "merger.mlp.0", "merger.mlp.2")

    def _windows(self, rows: int, columns: int) -> tuple[Indices, list[int]]:
        side = number(self._vision, "window_size") // self._shape.merge // self._shape.patch
        grid = np.arange(rows * columns).reshape(rows, columns)
        parts = [
            grid[row : row + side, column : column + side].reshape(-1)
            for row in range(0, rows, side)
            for column in range(0, columns, side)
        ]
        return np.concatenate(parts), [len(part) for part in parts]
