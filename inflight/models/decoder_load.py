"""Loads the decoder on torch's operators, or a rank's share of it, from a stream of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from inflight.checkpoint import Weights, floats_into
from inflight.device import Ranks
from inflight.models.adapter import module_slices
from inflight.models.config import DecoderConfig
from inflight.models.decoder import (
    Attention,
    Decoder,
    DecoderLayer,
    Linear,
    Mixture,
    Mlp,
    Part,
    PlainMlp,
    WideNorm,
)
from inflight.models.decoder_tensors import XIELU, DecoderTensors
from inflight.models.gemma4_shapes import LayerShape
from inflight.models.gemma4_torch import (
    Gemma4Attention,
    Gemma4Decoder,
    Gemma4Experts,
    Gemma4Layer,
    OwnInput,
    OwnTable,
)
from inflight.models.lora import AdapterTokens, LowRank
from inflight.models.pieces import Piece
from inflight.nn import AttentionSpec, EvenNorm, RmsNorm, activation, gating, to_array, xielu
from inflight.tensors import widened


def load_decoder(
    config: DecoderConfig,
    weights: Weights,
    ranks: Ranks,
    device: torch.device,
    dtype: str,
) -> Decoder:
    """Reads this rank's share of the weights.

    Raises:
        StartError: heads that cannot be divided, or a tensor that is missing or broken.
    """
    tensors = DecoderTensors(config, ranks.rank, ranks.size)
    source = _Source(tensors, weights, ranks, device, getattr(torch, dtype))
    embedding = source.vocabulary("embedding")
    numbers = range(config.layers)
    layers = [source.layer(index) for index in numbers] if config.gemma4 is None else []
    parts = source.gemma4_layers() if config.gemma4 is not None else []
    own = source.own_table() if config.gemma4 is not None and config.gemma4.own_size else None
    norm = source.last_norm()
    head = embedding if config.tied else source.vocabulary("head")
    make = Decoder if config.gemma4 is None else Gemma4Decoder
    low = source.adapter_tokens, source.low_ranks
    decoder = make(config, layers, embedding, head, norm, tensors.first_token, ranks, source.bytes, *low)
    if isinstance(decoder, Gemma4Decoder):
        decoder.give(parts, own)
    return decoder


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


class _Source:
    """Reads tensors of one checkpoint into their final place, dtype and device."""

    def __init__(
        self,
        tensors: DecoderTensors,
        weights: Weights,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.adapter_tokens = AdapterTokens()
        self.low_ranks: list[LowRank] = []
        self.bytes = 0
        self._tensors = tensors
        self._config = tensors.config
        self._weights = weights
        self._ranks = ranks
        self._device = device
        self._dtype = dtype

    def norm(self, name: str) -> RmsNorm:
        weight = self._stack((self._tensors.norm(name),))
        return RmsNorm(weight, self._config.eps, self._config.centered_norm)

    def last_norm(self) -> RmsNorm | EvenNorm:
        return EvenNorm(self.norm("norm").weight, self._config.eps) if self._config.layer_norm else self.norm("norm")

    def _before(self, name: str) -> Part | None:
        """The norm in front of a part, if there is one."""
        if not self._config.norm_first:
            return None
        norm = self.norm(name)
        return EvenNorm(norm.weight, norm.eps) if self._config.layer_norm else norm

    def _of_heads(self, name: str) -> Part | None:
        """The norm of queries or of keys, if there is one."""
        config, tensors = self._config, self._tensors
        if not config.wide_norm:
            return self.norm(name) if config.qk_norm else None
        heads, own = (config.heads, tensors.heads) if name.endswith("q_norm") else (config.kv_heads, tensors.kv_heads)
        copies = self._ranks.size * own // heads
        return WideNorm(self.norm(name).weight, config.eps, heads * config.head_dim, copies, self._ranks)

    def vocabulary(self, name: str) -> torch.Tensor:
        """This rank's rows of a table over the vocabulary; the last rank's is padded with zeros."""
        rows = self._stack(self._tensors.product(name).weights)
        missing = self._tensors.vocabulary - rows.shape[0]
        return rows if missing == 0 else torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])

    def layer(self, index: int) -> DecoderLayer:
        config = self._config
        mixed = config.experts is not None and config.experts.layers[index]
        return DecoderLayer(
            attention=self._attention(index),
            mlp=self._mixture(index) if mixed else self._mlp(index),
            before_attention=self._before(f"{index}.before_attention"),
            before_mlp=None if config.parallel else self._before(f"{index}.before_mlp"),
            after_attention=self.norm(f"{index}.after_attention") if config.sandwich else None,
            after_mlp=self.norm(f"{index}.after_mlp") if config.sandwich else None,
            parallel=config.parallel,
        )

    def _attention(self, index: int) -> Attention:
        config, tensors = self._config, self._tensors
        sinks = self._stack((tensors.array(f"{index}.sinks"),)) if config.sinks else None
        return Attention(
            spec=replace(attention_spec(config, index, tensors.heads, tensors.kv_heads), sinks=sinks),
            qkv=self._linear(f"{index}.qkv"),
            out=self._linear(f"{index}.out"),
            rope=config.rope_of[index],
            q_norm=self._of_heads(f"{index}.q_norm"),
            k_norm=self._of_heads(f"{index}.k_norm"),
            ranks=self._ranks,
            rotated=config.norm_rotated,
        )

    def gemma4_layers(self) -> list[Gemma4Layer]:
        config, own = self._config, self._config.gemma4
        assert own is not None
        caches = {
            layer: number for number, layer in enumerate(n for n in range(config.layers) if not own.reads_another(n))
        }
        return [self._gemma4_layer(index, shape, caches) for index, shape in enumerate(own.shapes)]

    def _gemma4_layer(self, index: int, shape: LayerShape, caches: Mapping[int, int]) -> Gemma4Layer:
        config, name = self._config, f"{index}."
        own_size = 0 if config.gemma4 is None else config.gemma4.own_size
        own = None
        if own_size:
            gate, out = (self._linear(f"{name}own_{part}", adapted=False) for part in ("gate", "out"))
            own = OwnInput(gate, out, self.norm(f"{name}after_own"))
        return Gemma4Layer(
            attention=self._gemma4_attention(index, shape, caches),
            mlp=self._mlp(index),
            experts=None if config.experts is None else self._gemma4_experts(name),
            own=own,
            before_attention=self.norm(f"{name}before_attention"),
            before_mlp=self.norm(f"{name}before_mlp"),
            after_attention=self.norm(f"{name}after_attention"),
            after_mlp=self.norm(f"{name}after_mlp"),
            scalar=self._stack((self._tensors.array(f"{name}scalar"),)),
        )

    def _gemma4_attention(self, index: int, shape: LayerShape, caches: Mapping[int, int]) -> Gemma4Attention:
        config, tensors, name, size = self._config, self._tensors, f"{index}.", self._ranks.size
        spec = attention_spec(config, index, tensors.heads, max(1, shape.kv_heads // size))
        cache = caches[index if shape.source is None else shape.source]
        ones = torch.ones(shape.dim, dtype=self._dtype, device=self._device)
        rope = config.rope_of[index]
        assert rope is not None
        return Gemma4Attention(
            index=index,
            source=shape.source,
            spec=replace(spec, layer=cache, head_dim=shape.dim, value_dim=shape.dim, causal=spec.window is None),
            qkv=self._linear(f"{name}qkv"),
            out=self._linear(f"{name}out"),
            rope=rope,
            q_norm=self.norm(f"{name}q_norm"),
            k_norm=self.norm(f"{name}k_norm") if shape.source is None else None,
            v_norm=RmsNorm(ones, config.eps),
            ranks=self._ranks,
        )

    def _gemma4_experts(self, name: str) -> Gemma4Experts:
        config, experts = self._config, self._config.experts
        assert experts is not None
        scale = self._stack((self._tensors.array(f"{name}router_scale"),)) * config.hidden**-0.5
        return Gemma4Experts(
            chosen=experts.chosen,
            router=self._linear(f"{name}router", adapted=False),
            scale=RmsNorm(scale, config.eps),
            factors=self._stack((self._tensors.array(f"{name}expert_factors"),)).float(),
            gate_up=[self._linear(f"{name}gate_up.{n}", adapted=False) for n in range(experts.count)],
            down=[self._linear(f"{name}down.{n}", adapted=False) for n in range(experts.count)],
            act=gating(config.activation),
            after_dense=self.norm(f"{name}after_dense"),
            before=self.norm(f"{name}before_experts"),
            after=self.norm(f"{name}after_experts"),
            ranks=self._ranks,
        )

    def own_table(self) -> OwnTable:
        """The layers' own embeddings; the table stays in the file."""
        config, own = self._config, self._config.gemma4
        assert own is not None
        [piece] = self._tensors.product("own_table").weights
        piece.check(self._weights)
        norm = replace(self.norm("own_norm"), eps=config.eps * config.hidden)  # of a product that is not scaled
        product = self._linear("own_in", adapted=False)
        return OwnTable(piece.read(self._weights), own.own_size**0.5, product, norm, config.layers)

    def _mlp(self, index: int) -> Mlp | PlainMlp:
        config, parts = self._config, (self._linear(f"{index}.gate_up"), self._linear(f"{index}.down"))
        if config.gated:
            return Mlp(*parts, gating(config.activation), self._ranks)
        return PlainMlp(*parts, self._xielu(index) if config.xielu else activation(config.activation), self._ranks)

    def _xielu(self, index: int) -> Part:
        """The activation with the layer's own factors, two of which are stored in front of a softplus."""
        found = []
        for kind in XIELU:
            piece = self._tensors.array(f"{index}.{kind}")
            piece.check(self._weights)
            stored = piece.read(self._weights)
            values = widened(stored if isinstance(stored, np.ndarray) else stored.dequantise())
            found.append(float(values.reshape(-1)[0]))
        squares, exponentials, linear = found
        return xielu(float(np.logaddexp(0.0, squares)), float(np.logaddexp(0.0, exponentials)), linear)

    def _mixture(self, index: int) -> Mixture:
        experts = self._config.experts
        assert experts is not None
        numbers = range(experts.count)
        return Mixture(
            config=experts,
            router=self._linear(f"{index}.router", adapted=False),
            gate_up=[self._linear(f"{index}.gate_up.{n}", adapted=False) for n in numbers],
            down=[self._linear(f"{index}.down.{n}", adapted=False) for n in numbers],
            act=gating(self._config.activation),
            ranks=self._ranks,
        )

    def _linear(self, name: str, *, adapted: bool = True) -> Linear:
        """A product, which adapters may change."""
        product = self._tensors.product(name)
        weight = self._stack(product.weights)
        bias = self._stack(product.biases) if product.biases else None
        if not adapted:
            return Linear(weight, bias)
        self.low_ranks.append(LowRank(self.adapter_tokens, module_slices(product), weight))
        return Linear(weight, bias, self.low_ranks[-1])

    def _stack(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Reads tensors, or slices of them, and stacks them."""
        for piece in pieces:
            piece.check(self._weights)  # a wrong config must not reserve memory
        sizes = [piece.size for piece in pieces]
        whole = torch.empty((sum(size[0] for size in sizes), *sizes[0][1:]), dtype=self._dtype)
        target, begin = to_array(whole), 0
        for piece, size in zip(pieces, sizes):
            tensor = piece.read(self._weights)
            floats_into(tensor, target[begin : begin + size[0]])
            begin += size[0]
            self._weights.release()
        self.bytes += whole.nbytes
        return whole.to(self._device)
