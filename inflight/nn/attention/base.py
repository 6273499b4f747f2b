"""The contract between a decoder layer and the backend that computes attention over the paged cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of one layer's attention, fixed at load.

    Attributes:
        layer: index of its cache.
        num_heads, num_kv_heads: on this rank; query head h reads key head h // (num_heads // num_kv_heads).
        head_dim: of queries and keys.
        value_dim: of values.
        scale: factor of the scores.
        window: a query at position p sees positions > p - window; None: all.
        softcap: scores become softcap * tanh(scores / softcap); None: off.
        sinks: a learnt logit per head, which takes part in the softmax and has no value.
        causal: no query sees a key behind its own, whatever `AttentionBatch.until` says.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class AttentionBatch:
    """The rows and slots of the tokens of one step. Rows follow each other in the flat token dimension.

    T tokens, R rows with tokens in this step. Rows with one token (decoding) come first: the first `num_decode` rows.

    Attributes:
        query_lens: tokens of each row in this step, host list of R ints >= 1, sum T.
        context_lens: tokens of each row with keys in the cache once this step's are written, host list of R ints.
        block_tables: int32 [R, blocks of the longest row]; entries past a row's blocks are 0 and must not be read.
        slots: int64 [T]; block * block_size + offset where each token's key and value go.
        block_size: tokens in a block.
        num_decode: leading rows with exactly one token.
        until: int64 [T], position of the last key that each token sees, in its row; None: its own.
    """

    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    slots: torch.Tensor
    block_size: int
    num_decode: int
    until: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerCache:
    """One layer's paged cache on this rank: keys [blocks, block_size, kv heads, head_dim], values likewise."""

    keys: torch.Tensor
    values: torch.Tensor


class AttentionBackend(ABC):
    """Causal attention over a paged cache.

    A backend holds the caches of all layers; a layer asks with its spec. It writes this step's keys and values to their
    slots before it attends, and may not touch any other slot: blocks can be shared by rows.
    """

    caches: list[LayerCache]

    @abstractmethod
    def forward(
        self, spec: AttentionSpec, batch: AttentionBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention of this step's tokens to themselves and all tokens before them in their rows, or up to `until`.

        Args:
            q: [T, num_heads, head_dim]; k: [T, num_kv_heads, head_dim]; v: [T, num_kv_heads, value_dim];
                rotary embedding already applied.

        Returns:
            [T, num_heads, value_dim], contiguous.
        """
