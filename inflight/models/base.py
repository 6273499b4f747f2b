"""A language model as the shard sees it: flat tokens in, logits out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from inflight.errors import StartError
from inflight.nn import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, Rope, make_attention
from inflight.types import Array

CACHE_LINE = 64
"""Bytes at a multiple of which arrays begin, as torch's own do."""


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], from 0 in each row.
        attention: which rows they belong to.
        logits_at: int64 [S], indices into T whose logits are wanted.
        adapters: tokens of rows with an adapter: its number and int64 indices into T.
        reach: int64 [T] on the host, see `inflight.nn.rope`; None: each token's own place and no further.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    logits_at: torch.Tensor
    adapters: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    reach: torch.Tensor | None = None


@dataclass(frozen=True)
class DecodeRows:
    """A batch whose rows all decode, as the shard keeps it: the arrays are its own.

    Attributes:
        ids: of the rows, N of them.
        tokens: int32 [>= N, width], known tokens of each row.
        blocks: int32 [>= N, blocks], block table of each row.
        known, computed: int64 [>= N]; `computed` is one less than `known`, and `tokens` has room for the next.
        greedy: every row takes its most likely token and wants nothing else.
    """

    ids: list[int]
    tokens: Array
    blocks: Array
    known: Array
    computed: Array
    greedy: bool


def reaches(ropes: Sequence[Rope]) -> tuple[int, int]:
    """`switch` and `stretched` of a model with these rotations.

    Raises:
        StartError: they differ in what they want to know of a sequence.
    """
    found = sorted({(rope.switch, rope.stretched) for rope in ropes if rope.switch or rope.stretched})
    if len(found) > 1:
        raise StartError("its layers' rotations scale with the length of a sequence in different ways")
    return found[0] if found else (0, 0)


class CausalLM(ABC):
    """A loaded model, or this rank's share of one.

    Attributes:
        family: which decoder it is, or `transformers` for the bridge.
        layers: what each layer's cache must hold; the shard makes the caches and binds a backend before the first step.
        vocab_size: columns of the logits.
        max_positions: longest sequence that the configuration allows.
        dtype: of the weights.
        weight_bytes: memory of this rank's weights.
        switch: sequences longer than this are computed anew when they grow over it: all of their tokens turn in another
            way then. 0: there is no such length.
        stretched: tokens of prompts longer than this turn by the prompt's length; 0: they never do.
        hidden: [S, H], what the logits of the last step were made of; None where the model does not show it.
        best: int64 [S] on the host, the first of the largest logits of each row, where the model has found it already.
    """

    family: str
    layers: list[AttentionSpec]
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    weight_bytes: int
    switch: int = 0
    stretched: int = 0
    hidden: torch.Tensor | None = None
    best: Array | None = None

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of the cache over all layers."""
        size = self.dtype.itemsize
        return sum(block_size * spec.num_kv_heads * (spec.head_dim + spec.value_dim) * size for spec in self.layers)

    def make_cache(self, blocks: int, block_size: int, device: torch.device) -> int:
        """Makes the cache of all layers and binds the model to it, before the first step; returns its bytes."""
        caches = [
            LayerCache(
                _zeros((blocks, block_size, spec.num_kv_heads, spec.head_dim), self.dtype, device),
                _zeros((blocks, block_size, spec.num_kv_heads, spec.value_dim), self.dtype, device),
            )
            for spec in self.layers
        ]
        self.bind(make_attention(caches, block_size, device))
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)

    @abstractmethod
    def bind(self, attention: AttentionBackend) -> None:
        """Sets what computes attention; once, before the first forward."""

    def decode(self, rows: DecodeRows, greedy: bool) -> torch.Tensor | None:
        """`forward` for the newest token of every row, straight from the batch's own arrays, where a model can do that.

        The tokens count as computed from then on; where `greedy`, the next ones are known too (`best`).

        Returns:
            Logits, float32 [N, vocab_size]; None where the model wants `forward`, nothing being done.
        """
        return None

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits, float32 [S, vocab_size], on rank 0; other ranks return an empty tensor where they need not gather."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory: a slot that was never written must not hold a NaN.

    On a CPU the system gives zeroed pages when they are first touched. `torch.zeros` would write all of them: seconds
    at every start, and memory that no request may ever need.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % CACHE_LINE
    return torch.from_numpy(raw[begin : begin + size]).view(dtype).view(shape)
