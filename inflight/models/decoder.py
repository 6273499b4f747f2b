"""One decoder for every family that `models/config.py` describes, or a rank's share of it.

Parallel ranks split heads, intermediate sizes and the vocabulary (Shoeybi et al., 2019): each layer ends in two sums
over the ranks. Key heads are replicated where there are fewer of them than ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from inflight.checkpoint import make_rope
from inflight.device import Ranks
from inflight.models.adapter import Adapter
from inflight.models.base import reaches
from inflight.models.config import DecoderConfig, Experts
from inflight.models.lora import AdapterTokens, LowFactors, LowRank
from inflight.models.on_torch import TensorBatch, TorchLM, dtype_name
from inflight.nn import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    CosSin,
    EvenNorm,
    Gate,
    RmsNorm,
    Rotation,
)

Part = Callable[[torch.Tensor], torch.Tensor]
"""A part of a layer: a function of hidden states."""


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b, and the updates of adapters."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    lora: LowRank | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.lora is not None:
            self.lora.add(x, y)
        return y


@dataclass(frozen=True)
class WideNorm:
    """A norm over the heads of all ranks.

    Attributes:
        weight: [heads * dim] of this rank's heads.
        width: values of all heads.
        copies: ranks that have each head.
    """

    weight: torch.Tensor
    eps: float
    width: int
    copies: int
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [T, heads, dim]."""
        wide = x.flatten(1).float()
        squares = self.ranks.all_reduce(wide.pow(2).sum(-1, keepdim=True)) / self.copies
        wide = self.weight.float() * (wide * torch.rsqrt(squares / self.width + self.eps))
        return wide.to(x.dtype).view(x.shape)


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values in one product, attention, and the output product, summed over the ranks.

    Attributes:
        rotated: the norms come behind the rotation.
    """

    spec: AttentionSpec
    qkv: Linear
    out: Linear
    rope: str | None
    q_norm: Part | None
    k_norm: Part | None
    ranks: Ranks
    rotated: bool = False

    def __call__(
        self,
        x: torch.Tensor,
        ropes: dict[str, Rotation],
        cos_sin: dict[str, CosSin],
        attention: AttentionBackend,
        batch: AttentionBatch,
        grown: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args: grown: [T, 1, 1], what queries are multiplied with; None: nothing."""
        spec = self.spec
        sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.value_dim]
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)) for part in self.qkv(x).split(sizes, dim=-1))
        if not self.rotated:
            q, k = self._normed(q, k)
        if self.rope is not None:
            rope, angles = ropes[self.rope], cos_sin[self.rope]
            q, k = rope.apply(q, angles), rope.apply(k, angles)
        if self.rotated:
            q, k = self._normed(q, k)
        if grown is not None:
            q = q * grown
        out = attention.forward(spec, batch, q, k, v)
        return self.ranks.all_reduce(self.out(out.flatten(1)))

    def _normed(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


@dataclass(frozen=True)
class PlainMlp:
    """down(act(up(x))), summed over the ranks."""

    up: Linear
    down: Linear
    act: Part
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ranks.all_reduce(self.down(self.act(self.up(x))))


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one product; summed over the ranks."""

    gate_up: Linear
    down: Linear
    act: Gate
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.ranks.all_reduce(self.down(self.act(gate, up)))


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts. Each token goes to its most likely experts; every rank has a slice of every expert."""

    config: Experts
    router: Linear
    gate_up: list[Linear]
    down: list[Linear]
    act: Gate
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(self.router(x).float(), dim=-1)
        weights, chosen = torch.topk(chances, self.config.chosen, dim=-1)
        if self.config.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            tokens, place = torch.nonzero(chosen == expert, as_tuple=True)
            gate, up = self.gate_up[expert](x[tokens]).chunk(2, dim=-1)
            out.index_add_(0, tokens, self.down[expert](self.act(gate, up)) * weights[tokens, place].unsqueeze(1))
        return self.ranks.all_reduce(out)


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP with their norms, as far as the family has them.

    Attributes:
        parallel: the MLP reads what attention reads.
    """

    attention: Attention
    mlp: Part
    before_attention: Part | None
    before_mlp: Part | None
    after_attention: Part | None
    after_mlp: Part | None
    parallel: bool = False


class Decoder(TorchLM):
    """The decoder of a `DecoderConfig`. `load_decoder` (`models/decoder_load.py`) makes it."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: list[DecoderLayer],
        embedding: torch.Tensor,
        head: torch.Tensor,
        norm: RmsNorm | EvenNorm,
        first_token: int,
        ranks: Ranks,
        weight_bytes: int,
        adapter_tokens: AdapterTokens,
        low_ranks: list[LowRank],
    ) -> None:
        self._adapter_tokens = adapter_tokens
        self._low_ranks = low_ranks
        self.family = config.family
        self.layers = [layer.attention.spec for layer in layers]
        self.vocab_size = config.vocab_size
        self.max_positions = config.longest
        self.torch_dtype, self.device = norm.weight.dtype, norm.weight.device
        self.dtype = dtype_name(self.torch_dtype)
        self.weight_bytes = weight_bytes
        self.hidden = None
        self._config = config
        self._layers = layers
        self._embedding = embedding
        self._head = head
        self._norm = norm
        self._first_token = first_token
        self._ranks = ranks
        ropes = {
            name: make_rope(settings, config.rope_dim(name), config.max_positions)
            for name, settings in config.ropes.items()
        }
        self.switch, self.stretched = reaches(list(ropes.values()))
        self.image_width = config.hidden if config.images else 0
        self.image_layers = config.deepstack
        self._ropes = {name: Rotation(rope, self.device, config.axes) for name, rope in ropes.items()}
        self._attention: AttentionBackend | None = None

    def bind(self, attention: AttentionBackend) -> None:
        self._attention = attention

    def read_adapter(self, adapter: Adapter) -> list[list[LowFactors]]:
        factors = [low.read(adapter, self._config.head_dim) for low in self._low_ranks]
        adapter.finish()
        return factors

    def add_adapter(self, number: int, factors: list[list[LowFactors]]) -> None:
        for low, own in zip(self._low_ranks, factors):
            low.set(number, own)
        super().add_adapter(number, factors)

    def drop_adapter(self, number: int) -> None:
        for low in self._low_ranks:
            low.set(number, [])
        super().drop_adapter(number)

    def compute(self, batch: TensorBatch) -> torch.Tensor:
        self._adapter_tokens.current = batch.adapters
        reach = None if batch.reach is None else batch.reach.to(batch.positions.device)
        cos_sin = {
            name: rope.cos_sin(batch.positions, self.torch_dtype, reach, batch.places)
            for name, rope in self._ropes.items()
        }
        x = self._embed(batch.token_ids)
        given = [rows.to(x.dtype) for rows in batch.image_rows]
        if batch.image_at is not None:
            x = x.index_copy(0, batch.image_at, given[0])
        x = self.run_layers(x, cos_sin, batch, given)
        self.hidden = self._norm(x[batch.logits_at])
        return self._logits(self.hidden)

    def run_layers(
        self, x: torch.Tensor, cos_sin: dict[str, CosSin], batch: TensorBatch, given: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states [T, hidden] behind the last layer.

        Args:
            x: the tokens' embeddings.
            given: rows of images, and what they add behind the first layers.
        """
        attention, scale = self._attention, self._config.residual_scale
        assert attention is not None
        grown = self._grown(batch.positions, x.dtype)
        for index, layer in enumerate(self._layers):
            source = x if layer.before_attention is None else layer.before_attention(x)
            y = layer.attention(source, self._ropes, cos_sin, attention, batch.attention, grown)
            if layer.after_attention is not None:
                y = layer.after_attention(y)
            x = x + (y if scale == 1.0 else y * scale)
            if not layer.parallel:
                source = x if layer.before_mlp is None else layer.before_mlp(x)
            y = layer.mlp(source)
            if layer.after_mlp is not None:
                y = layer.after_mlp(y)
            x = x + (y if scale == 1.0 else y * scale)
            if batch.image_at is not None and index + 1 < len(given):
                x = x.index_add(0, batch.image_at, given[index + 1])
        return x

    def _grown(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        growth = self._config.growth
        if growth is None:
            return None
        periods = (positions // growth.period).float()
        return (1.0 + growth.factor * torch.log1p(periods)).to(dtype).view(-1, 1, 1)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._ranks.size == 1:
            x = F.embedding(tokens, self._embedding)
        else:
            local = tokens - self._first_token
            mine = (local >= 0) & (local < self._embedding.shape[0])
            x = F.embedding(local.where(mine, torch.zeros_like(local)), self._embedding)
            x = self._ranks.all_reduce(x * mine.unsqueeze(1).to(x.dtype))
        if self._config.embedding_scale != 1.0:
            # Rounded to the weights' dtype first, as the models were trained.
            x = x * torch.tensor(self._config.embedding_scale, dtype=x.dtype, device=x.device)
        return x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = self._ranks.gather(F.linear(x, self._head))
        if logits is None:
            return x.new_empty(0)
        logits = logits[:, : self.vocab_size].float()
        if self._config.logits_divider != 1.0:
            logits = logits / self._config.logits_divider
        if self._config.final_softcap is not None:
            logits = torch.tanh(logits / self._config.final_softcap) * self._config.final_softcap
        return logits
