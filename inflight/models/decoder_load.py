"""Loads the decoder on torch's operators, or a rank's share of it, from a stream of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inflight.checkpoint import Weights, floats_into
from inflight.device import Ranks
from inflight.models.config import DecoderConfig
from inflight.models.decoder import Attention, Decoder, DecoderLayer, Linear, Mixture, Mlp
from inflight.models.decoder_tensors import DecoderTensors, Piece, Product
from inflight.models.lora import Adapter, AdapterTokens, LowRank, ModuleSlice
from inflight.nn import AttentionSpec, RmsNorm, activation, to_array


def load_decoder(
    config: DecoderConfig,
    weights: Weights,
    ranks: Ranks,
    device: torch.device,
    dtype: str,
    adapters: Sequence[Adapter] = (),
) -> Decoder:
    """Reads this rank's share of the weights, and of the adapters, which get the numbers 1, 2, ...

    Raises:
        StartError: heads that cannot be divided, or a tensor that is missing or broken.
    """
    tensors = DecoderTensors(config, ranks.rank, ranks.size)
    source = _Source(tensors, weights, ranks, device, getattr(torch, dtype), adapters)
    embedding = source.vocabulary("embedding")
    layers = [source.layer(index) for index in range(config.layers)]
    norm = source.norm("norm")
    head = embedding if config.tied else source.vocabulary("head")
    for adapter in adapters:
        adapter.finish()
    return Decoder(
        config, layers, embedding, head, norm, tensors.first_token, ranks, source.bytes, source.adapter_tokens
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


class _Source:
    """Reads tensors of one checkpoint into their final place, dtype and device."""

    def __init__(
        self,
        tensors: DecoderTensors,
        weights: Weights,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        adapters: Sequence[Adapter],
    ) -> None:
        self.adapter_tokens = AdapterTokens()
        self.bytes = 0
        self._tensors = tensors
        self._config = tensors.config
        self._weights = weights
        self._ranks = ranks
        self._device = device
        self._dtype = dtype
        self._adapters = adapters

    def norm(self, name: str) -> RmsNorm:
        weight = self._stack((self._tensors.norm(name),))
        return RmsNorm(weight, self._config.eps, self._config.centered_norm)

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
            before_attention=self.norm(f"{index}.before_attention"),
            before_mlp=self.norm(f"{index}.before_mlp"),
            after_attention=self.norm(f"{index}.after_attention") if config.sandwich else None,
            after_mlp=self.norm(f"{index}.after_mlp") if config.sandwich else None,
        )

    def _attention(self, index: int) -> Attention:
        config, tensors = self._config, self._tensors
        return Attention(
            spec=attention_spec(config, index, tensors.heads, tensors.kv_heads),
            qkv=self._linear(f"{index}.qkv"),
            out=self._linear(f"{index}.out"),
            rope=config.rope_of[index],
            q_norm=self.norm(f"{index}.q_norm") if config.qk_norm else None,
            k_norm=self.norm(f"{index}.k_norm") if config.qk_norm else None,
            ranks=self._ranks,
        )

    def _mlp(self, index: int) -> Mlp:
        act = activation(self._config.activation)
        return Mlp(self._linear(f"{index}.gate_up"), self._linear(f"{index}.down"), act, self._ranks)

    def _mixture(self, index: int) -> Mixture:
        experts = self._config.experts
        assert experts is not None
        numbers = range(experts.count)
        return Mixture(
            config=experts,
            router=self._stack(self._tensors.product(f"{index}.router").weights),
            gate_up=[self._linear(f"{index}.gate_up.{n}", adapted=False) for n in numbers],
            down=[self._linear(f"{index}.down.{n}", adapted=False) for n in numbers],
            act=activation(self._config.activation),
            ranks=self._ranks,
        )

    def _linear(self, name: str, *, adapted: bool = True) -> Linear:
        """A product, with the adapters' updates to the modules in it."""
        product = self._tensors.product(name)
        weight = self._stack(product.weights)
        bias = self._stack(product.biases) if product.biases else None
        if not self._adapters or not adapted:
            return Linear(weight, bias)
        lora = LowRank(self.adapter_tokens, _module_slices(product))
        for number, adapter in enumerate(self._adapters, 1):
            lora.load(number, adapter, weight)
        return Linear(weight, bias, lora)

    def _stack(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Reads tensors, or slices of them, and stacks them."""
        for piece in pieces:
            self._weights.check(piece.name, piece.shape)  # a wrong config must not reserve memory
        sizes = [piece.size for piece in pieces]
        whole = torch.empty((sum(size[0] for size in sizes), *sizes[0][1:]), dtype=self._dtype)
        target, begin = to_array(whole), 0
        for piece, size in zip(pieces, sizes):
            tensor = self._weights.read(piece.name, piece.shape, piece.part)
            floats_into(tensor, target[begin : begin + size[0]])
            begin += size[0]
            self._weights.release()
        self.bytes += whole.nbytes
        return whole.to(self._device)


def _module_slices(product: Product) -> list[ModuleSlice]:
    """The modules of the checkpoint in a product."""
    slices, offset = [], 0
    for piece in product.weights:
        dim, first, end = piece.part or (0, 0, piece.shape[0])
        rows = (first, end) if dim == 0 else (0, piece.shape[0])
        columns = (first, end) if dim == 1 else None
        slices.append(ModuleSlice(piece.name.removesuffix(".weight"), rows, offset, columns))
        offset += piece.size[0]
    return slices
