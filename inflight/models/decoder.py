"""One decoder for every family that `models/config.py` describes, or a rank's share of it.

Parallel ranks split heads, intermediate sizes and the vocabulary (Shoeybi et al., 2019): each layer ends in two sums
over the ranks. Key heads are replicated where there are fewer of them than ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from inflight.device import Ranks
from inflight.errors import StartError
from inflight.models.base import CausalLM, ForwardBatch, reaches
from inflight.models.config import DecoderConfig, Experts
from inflight.models.lora import Adapter, LowRank, Place, Routes
from inflight.models.weights import Checkpoint, Part
from inflight.nn import (
    Activation,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    RmsNorm,
    Rope,
    activation,
    make_rope,
)
from inflight.tensors import Quantised, stack

Turn = tuple[torch.Tensor, torch.Tensor]
Weight: TypeAlias = torch.Tensor | Quantised


@dataclass(frozen=True)
class _Linear:
    """y = x Wᵀ + b, and what adapters add."""

    weight: Weight
    bias: torch.Tensor | None = None
    lora: LowRank | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.weight, torch.Tensor), "integers are for the CPU engine"
        y = F.linear(x, self.weight, self.bias)
        if self.lora is not None:
            self.lora.add(x, y)
        return y


@dataclass(frozen=True)
class _Attention:
    """Queries, keys and values in one product; attention; the way back, summed over the ranks."""

    spec: AttentionSpec
    qkv: _Linear
    out: _Linear
    rope: str | None
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    ranks: Ranks

    def __call__(
        self,
        x: torch.Tensor,
        ropes: dict[str, Rope],
        turns: dict[str, Turn],
        attention: AttentionBackend,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        spec = self.spec
        sizes = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.value_dim]
        q, k, v = (part.unflatten(-1, (-1, spec.head_dim)) for part in self.qkv(x).split(sizes, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            rope, turn = ropes[self.rope], turns[self.rope]
            q, k = rope.apply(q, turn), rope.apply(k, turn)
        out = attention.forward(spec, batch, q, k, v)
        return self.ranks.all_reduce(self.out(out.flatten(1)))


@dataclass(frozen=True)
class _Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one product; summed over the ranks."""

    gate_up: _Linear
    down: _Linear
    act: Activation
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.ranks.all_reduce(self.down(self.act(gate) * up))


@dataclass(frozen=True)
class _Mixture:
    """Each token goes to its best experts; every rank has a slice of every expert."""

    config: Experts
    router: torch.Tensor
    gate_up: list[_Linear]
    down: list[_Linear]
    act: Activation
    ranks: Ranks

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(F.linear(x, self.router).float(), dim=-1)
        weights, chosen = torch.topk(chances, self.config.chosen, dim=-1)
        if self.config.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for expert in torch.unique(chosen).tolist():
            tokens, place = torch.nonzero(chosen == expert, as_tuple=True)
            gate, up = self.gate_up[expert](x[tokens]).chunk(2, dim=-1)
            out.index_add_(0, tokens, self.down[expert](self.act(gate) * up) * weights[tokens, place].unsqueeze(1))
        return self.ranks.all_reduce(out)


@dataclass(frozen=True)
class _Layer:
    """Attention and MLP with their norms; `after_*` are there in sandwich form only."""

    attention: _Attention
    mlp: Callable[[torch.Tensor], torch.Tensor]
    before_attention: RmsNorm
    before_mlp: RmsNorm
    after_attention: RmsNorm | None
    after_mlp: RmsNorm | None


def _parts(layer: _Layer) -> Iterator[tuple[str, tuple[Weight, torch.Tensor | None]]]:
    """What a layer is made of, by name."""
    attention, mlp = layer.attention, layer.mlp
    linears = {"qkv": attention.qkv, "out": attention.out}
    if isinstance(mlp, _Mixture):
        yield "router", (mlp.router, None)
        linears |= {f"gate_up.{expert}": linear for expert, linear in enumerate(mlp.gate_up)}
        linears |= {f"down.{expert}": linear for expert, linear in enumerate(mlp.down)}
    else:
        assert isinstance(mlp, _Mlp)
        linears |= {"gate_up": mlp.gate_up, "down": mlp.down}
    for name, linear in linears.items():
        yield name, (linear.weight, linear.bias)
    for name, norm in (
        ("before_attention", layer.before_attention),
        ("before_mlp", layer.before_mlp),
        ("after_attention", layer.after_attention),
        ("after_mlp", layer.after_mlp),
        ("q_norm", attention.q_norm),
        ("k_norm", attention.k_norm),
    ):
        if norm is not None:
            yield name, (norm.weight, None)


class Decoder(CausalLM):
    """See `DecoderConfig`. Made by `load_decoder`."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: list[_Layer],
        embedding: Weight,
        head: Weight,
        norm: RmsNorm,
        first_token: int,
        ranks: Ranks,
        weight_bytes: int,
        routes: Routes,
    ) -> None:
        self._routes = routes
        self.family = config.family
        self.layers = [layer.attention.spec for layer in layers]
        self.vocab_size = config.vocab_size
        self.max_positions = config.longest
        self.dtype = norm.weight.dtype
        self.weight_bytes = weight_bytes
        self.hidden = None
        self._config = config
        self._layers = layers
        self._embedding = embedding
        self._head = head
        self._norm = norm
        self._first_token = first_token
        self._ranks = ranks
        self._ropes = {
            name: make_rope(settings, config.head_dim, config.max_positions, norm.weight.device)
            for name, settings in config.ropes.items()
        }
        self.switch, self.stretched = reaches(list(self._ropes.values()))
        self._attention: AttentionBackend | None = None

    def release(self) -> dict[str, tuple[Weight, torch.Tensor | None]]:
        """Every weight and its bias by name, for whoever computes with them in another way; nothing of it stays here.

        Names: embedding, norm, head (unless tied); of layer n: n.qkv, n.out, n.gate_up, n.down, or n.router,
        n.gate_up.e, n.down.e of expert e; and norms n.before_attention, n.before_mlp, n.after_attention, n.after_mlp,
        n.q_norm, n.k_norm where there are such.
        """
        parts: dict[str, tuple[Weight, torch.Tensor | None]] = {
            "embedding": (self._embedding, None),
            "norm": (self._norm.weight, None),
        }
        if self._head is not self._embedding:
            parts["head"] = (self._head, None)
        for index, layer in enumerate(self._layers):
            parts.update({f"{index}.{name}": part for name, part in _parts(layer)})
        self._layers.clear()
        self._embedding = self._head = torch.empty(0)
        return parts

    def bind(self, attention: AttentionBackend) -> None:
        self._attention = attention

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        attention = self._attention
        assert attention is not None
        self._routes.current = batch.adapters
        scale = self._config.residual_scale
        reach = None if batch.reach is None else batch.reach.to(batch.positions.device)
        turns = {name: rope.turn(batch.positions, self.dtype, reach) for name, rope in self._ropes.items()}
        x = self._embed(batch.token_ids)
        for layer in self._layers:
            y = layer.attention(layer.before_attention(x), self._ropes, turns, attention, batch.attention)
            if layer.after_attention is not None:
                y = layer.after_attention(y)
            x = x + (y if scale == 1.0 else y * scale)
            y = layer.mlp(layer.before_mlp(x))
            if layer.after_mlp is not None:
                y = layer.after_mlp(y)
            x = x + (y if scale == 1.0 else y * scale)
        self.hidden = self._norm(x[batch.logits_at])
        return self._logits(self.hidden)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        assert isinstance(self._embedding, torch.Tensor), "integers are for the CPU engine"
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
        assert isinstance(self._head, torch.Tensor)
        logits = self._ranks.gather(F.linear(x, self._head))
        if logits is None:
            return x.new_empty(0)
        logits = logits[:, : self.vocab_size].float()
        if self._config.logits_divider != 1.0:
            logits = logits / self._config.logits_divider
        if self._config.final_softcap is not None:
            logits = torch.tanh(logits / self._config.final_softcap) * self._config.final_softcap
        return logits


def load_decoder(
    config: DecoderConfig,
    checkpoint: Checkpoint,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    adapters: Sequence[Adapter] = (),
    *,
    integers: bool = False,
) -> Decoder:
    """Reads this rank's share of the weights, and of the adapters, which get the numbers 1, 2, ...

    Args:
        integers: quantised weights stay integers, for `Decoder.release`; they cannot be run here.

    Raises:
        StartError: heads that cannot be divided, or a tensor that is missing or broken.
    """
    _check_ranks(config, ranks.size)
    source = _Source(config, checkpoint, ranks, device, dtype, adapters, integers)
    share = -(-config.vocab_size // ranks.size)
    first = ranks.rank * share
    embedding = source.vocabulary(f"{config.prefix}embed_tokens.weight", first, share)
    layers = [_layer(source, index) for index in range(config.layers)]
    norm = source.norm(f"{config.prefix}norm.weight", config.hidden)
    head = embedding if config.tied else source.vocabulary(config.head_name, first, share)
    for adapter in adapters:
        adapter.finish()
    return Decoder(config, layers, embedding, head, norm, first, ranks, source.bytes, source.routes)


def _check_ranks(config: DecoderConfig, size: int) -> None:
    uneven = [
        f"{count} {what}"
        for what, count in (("attention heads", config.heads), ("intermediate columns", config.intermediate))
        if count % size
    ]
    if max(config.kv_heads, size) % min(config.kv_heads, size):
        uneven.append(f"{config.kv_heads} key heads")
    if config.experts is not None and config.experts.size % size:
        uneven.append(f"{config.experts.size} columns of an expert")
    if uneven:
        raise StartError(
            f"--tensor-parallel {size} does not divide the model's {', '.join(uneven)}; use a number that does"
        )


class _Source:
    """Reads tensors of one checkpoint into their final place, dtype and device."""

    def __init__(
        self,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        adapters: Sequence[Adapter],
        integers: bool,
    ) -> None:
        self.routes = Routes()
        self._integers = integers
        self._adapters = adapters
        self.config = config
        self.ranks = ranks
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self.bytes = 0

    def norm(self, name: str, size: int) -> RmsNorm:
        weight = self.stack([(name, (size,), None)])
        return RmsNorm(weight, self.config.eps, self.config.centered_norm)

    def stack(self, pieces: list[tuple[str, tuple[int, ...], Part | None]]) -> torch.Tensor:
        """Tensors, or parts of them, one above the other in one tensor."""
        for name, shape, _ in pieces:
            self._checkpoint.check(name, shape)  # before memory is reserved for a config that lies
        sizes = [_part_shape(shape, part) for _, shape, part in pieces]
        rows = sum(size[0] for size in sizes)
        whole = torch.empty((rows, *sizes[0][1:]), dtype=self._dtype, device=self._device)
        begin = 0
        for (name, shape, part), size in zip(pieces, sizes):
            whole[begin : begin + size[0]] = self._checkpoint.read(name, shape, part)
            begin += size[0]
        self.bytes += whole.nbytes
        return whole

    def weight(self, pieces: list[tuple[str, tuple[int, ...], Part | None]]) -> Weight:
        """As `stack`; integers where all pieces are, of one scheme, and they were asked for."""
        if self._integers:
            parts = [self._checkpoint.quantised(*piece) for piece in pieces]
            schemes = [(p.bits, p.group, p.offsets is None) for p in parts if p is not None]
            if len(schemes) == len(parts) and all(scheme == schemes[0] for scheme in schemes):
                return stack([part for part in parts if part is not None])
        return self.stack(pieces)

    def linear(self, weight: Weight, bias: torch.Tensor | None, places: list[Place]) -> _Linear:
        """A product with what the adapters do to the modules in it."""
        if not self._adapters:
            return _Linear(weight, bias)
        assert isinstance(weight, torch.Tensor)
        lora = LowRank(self.routes, places)
        for number, adapter in enumerate(self._adapters, 1):
            lora.load(number, adapter, weight)
        return _Linear(weight, bias, lora)

    def vocabulary(self, name: str, first: int, share: int) -> Weight:
        """This rank's rows of a table over the vocabulary; the last rank's is filled up with zeros."""
        shape = (self.config.vocab_size, self.config.hidden)
        last = min(first + share, self.config.vocab_size)
        rows = self.weight([(name, shape, (0, first, last))])
        if isinstance(rows, torch.Tensor) and rows.shape[0] < share:
            rows = torch.cat([rows, rows.new_zeros(share - rows.shape[0], shape[1])])
        return rows

    def has(self, name: str) -> bool:
        return name in self._checkpoint


def _part_shape(shape: tuple[int, ...], part: Part | None) -> tuple[int, ...]:
    if part is None:
        return shape
    dim, first, end = part
    return (*shape[:dim], end - first, *shape[dim + 1 :])


def _layer(source: _Source, index: int) -> _Layer:
    config = source.config
    prefix = f"{config.prefix}layers.{index}."
    experts = config.experts
    mixed = experts is not None and experts.layers[index]
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich:
        names = [
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ]
    norms = [source.norm(f"{prefix}{name}.weight", config.hidden) for name in names]
    return _Layer(
        attention=_attention(source, prefix, index),
        mlp=_mixture(source, prefix) if mixed else _mlp(source, prefix),
        before_attention=norms[0],
        before_mlp=norms[1],
        after_attention=norms[2] if config.sandwich else None,
        after_mlp=norms[3] if config.sandwich else None,
    )


def attention_spec(config: DecoderConfig, index: int, heads: int, kv_heads: int) -> AttentionSpec:
    """A layer's attention with a rank's number of heads."""
    return AttentionSpec(
        layer=index,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.head_dim,
        value_dim=config.head_dim,
        scale=config.scale,
        window=config.windows[index],
        softcap=config.softcap,
    )


def _attention(source: _Source, prefix: str, index: int) -> _Attention:
    config, ranks = source.config, source.ranks
    size, rank, dim = ranks.size, ranks.rank, config.head_dim
    heads = config.heads // size
    kv_heads = max(1, config.kv_heads // size)
    q_first = rank * heads * dim
    kv_first = (rank * config.kv_heads // size) * dim
    shares = {
        "q": (config.heads * dim, q_first, heads * dim),
        "k": (config.kv_heads * dim, kv_first, kv_heads * dim),
        "v": (config.kv_heads * dim, kv_first, kv_heads * dim),
    }
    weights: list[tuple[str, tuple[int, ...], Part | None]] = []
    biases: list[tuple[str, tuple[int, ...], Part | None]] = []
    offset, total, at = 0, (config.heads + 2 * config.kv_heads) * dim, 0
    places: list[Place] = []
    for key, (rows, first, count) in shares.items():
        if config.fused:
            part = (0, offset + first, offset + first + count)
            weights.append((f"{prefix}self_attn.qkv_proj.weight", (total, config.hidden), part))
            places.append(Place(f"{prefix}self_attn.qkv_proj", (part[1], part[2]), at))
            offset += rows
        else:
            weights.append((f"{prefix}self_attn.{key}_proj.weight", (rows, config.hidden), (0, first, first + count)))
            biases.append((f"{prefix}self_attn.{key}_proj.bias", (rows,), (0, first, first + count)))
            places.append(Place(f"{prefix}self_attn.{key}_proj", (first, first + count), at))
        at += count
    out_part = (1, q_first, q_first + heads * dim)
    out = source.weight([(f"{prefix}self_attn.o_proj.weight", (config.hidden, config.heads * dim), out_part)])
    # A bias is added once: on rank 0.
    has_out_bias = config.out_bias and rank == 0
    out_bias = source.stack([(f"{prefix}self_attn.o_proj.bias", (config.hidden,), None)]) if has_out_bias else None
    spec = attention_spec(config, index, heads, kv_heads)
    return _Attention(
        spec=spec,
        qkv=source.linear(source.weight(weights), source.stack(biases) if config.qkv_bias else None, places),
        out=source.linear(
            out, out_bias, [Place(f"{prefix}self_attn.o_proj", (0, config.hidden), 0, (out_part[1], out_part[2]))]
        ),
        rope=config.rope_of[index],
        q_norm=source.norm(f"{prefix}self_attn.q_norm.weight", dim) if config.qk_norm else None,
        k_norm=source.norm(f"{prefix}self_attn.k_norm.weight", dim) if config.qk_norm else None,
        ranks=ranks,
    )


def _mlp(source: _Source, prefix: str) -> _Mlp:
    config, ranks = source.config, source.ranks
    rows = config.intermediate
    share = rows // ranks.size
    first = ranks.rank * share
    wide = (rows, config.hidden)
    if config.fused:
        name, both = f"{prefix}mlp.gate_up_proj.weight", (2 * rows, config.hidden)
        pieces = [(name, both, (0, start, start + share)) for start in (first, rows + first)]
        places = [
            Place(f"{prefix}mlp.gate_up_proj", (start, start + share), at)
            for start, at in ((first, 0), (rows + first, share))
        ]
    else:
        pieces = [(f"{prefix}mlp.{key}_proj.weight", wide, (0, first, first + share)) for key in ("gate", "up")]
        places = [
            Place(f"{prefix}mlp.{key}_proj", (first, first + share), at) for key, at in (("gate", 0), ("up", share))
        ]
    biases = [(f"{prefix}mlp.{key}_proj.bias", (rows,), (0, first, first + share)) for key in ("gate", "up")]
    down = source.weight([(f"{prefix}mlp.down_proj.weight", (config.hidden, rows), (1, first, first + share))])
    down_bias = None
    if config.mlp_bias and ranks.rank == 0:
        down_bias = source.stack([(f"{prefix}mlp.down_proj.bias", (config.hidden,), None)])
    return _Mlp(
        gate_up=source.linear(source.weight([*pieces]), source.stack([*biases]) if config.mlp_bias else None, places),
        down=source.linear(
            down, down_bias, [Place(f"{prefix}mlp.down_proj", (0, config.hidden), 0, (first, first + share))]
        ),
        act=activation(config.activation),
        ranks=ranks,
    )


def _mixture(source: _Source, prefix: str) -> _Mixture:
    config, ranks = source.config, source.ranks
    experts = config.experts
    assert experts is not None
    share = experts.size // ranks.size
    first = ranks.rank * share
    part = (first, first + share)
    wide, narrow = (experts.size, config.hidden), (config.hidden, experts.size)
    gate, up, down = (f"{prefix}{name}" for name in experts.names)
    numbers = range(experts.count)
    return _Mixture(
        config=experts,
        router=source.stack([(f"{prefix}{experts.router}", (experts.count, config.hidden), None)]),
        gate_up=[
            _Linear(source.weight([(gate.format(n), wide, (0, *part)), (up.format(n), wide, (0, *part))]))
            for n in numbers
        ],
        down=[_Linear(source.weight([(down.format(n), narrow, (1, *part))])) for n in numbers],
        act=activation(config.activation),
        ranks=ranks,
    )
