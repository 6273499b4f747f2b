"""The tensors of a checkpoint that each weight of a decoder consists of, and the part of them that a rank loads.

Parallel ranks split heads, intermediate sizes and the vocabulary (Shoeybi et al., 2019). Key heads are replicated where
there are fewer of them than ranks.

Products have names: embedding, head (unless tied); of layer n: n.qkv, n.out, n.gate_up, n.down, or n.router,
n.gate_up.e, n.down.e of expert e. Norms: norm, and n.before_attention, n.before_mlp, n.after_attention, n.after_mlp,
n.q_norm, n.k_norm if the family has them. Latent attention has those of `inflight.models.latent_tensors`.

Where attention has an output gate, its product is the last part of n.qkv. Recurrent layers have what
`inflight.models.recurrent_tensors` says. A shared expert has n.shared_gate_up, n.shared_down and n.shared_router. Also
float32 stay n.sinks, n.expert_bias, which is added to the router's scores for the choice of experts, and n.squares,
n.exponentials and n.linear, the factors of xIELU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from inflight.checkpoint import Slice, Weights
from inflight.errors import StartError
from inflight.models.description import DecoderConfig
from inflight.models.gemma4_tensors import gemma4_array, gemma4_norm, gemma4_product
from inflight.models.latent_tensors import latent_norm, latent_product, lies_apart
from inflight.models.pieces import Piece, Product, by_head
from inflight.models.recurrent_tensors import conv_factors, recurrent_array, recurrent_product
from inflight.tensors import Floats

log = logging.getLogger("inflight")

_EMBEDDING = "embed_tokens.weight"
XIELU: dict[str, tuple[str, tuple[int, ...]]] = {
    "squares": ("alpha_p", (1,)),
    "exponentials": ("alpha_n", (1,)),
    "linear": ("beta", ()),
}
"""Names of its factors below `mlp.act_fn`. Its `eps` is not read: what it changes is smaller than itself, 1e-6."""
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "model.text_model.")


class DecoderTensors:
    """A rank's share of a decoder.

    Args:
        config: the description with the checkpoint's names (`located`).

    Raises:
        StartError: the ranks do not divide the model.
    """

    def __init__(self, config: DecoderConfig, rank: int = 0, size: int = 1) -> None:
        _check_ranks(config, size)
        self.config = config
        self.rank = rank
        self.size = size
        self.heads = config.heads // size
        self.kv_heads = max(1, config.kv_heads // size)
        self.vocabulary = -(-config.vocab_size // size)
        self.first_token = rank * self.vocabulary

    def product(self, name: str) -> Product:
        """The tensors of a product, by its name (see the module)."""
        found = self._product(name)
        return Product(tuple(map(self._named, found.weights)), tuple(map(self._named, found.biases)))

    def norm(self, name: str) -> Piece:
        """The tensor of a norm, by its name (see the module)."""
        return self._named(self._norm(name))

    def array(self, name: str) -> Piece:
        """A small array, by its name (see the module)."""
        found = None if self.config.gemma4 is None else gemma4_array(self.config, name)
        if found is not None:
            return found
        index, kind = name.split(".")
        prefix = f"{self.config.prefix}layers.{index}."
        if kind == "sinks":
            first = self.rank * self.heads
            return self._piece(f"{prefix}self_attn.sinks", (self.config.heads,), first, first + self.heads)
        experts = self.config.experts
        if kind == "expert_bias":
            assert experts is not None
            return self._named(Piece(f"{prefix}{experts.bias}", (experts.count,)))
        if kind in XIELU:
            name, shape = XIELU[kind]
            return Piece(f"{prefix}mlp.act_fn.{name}", shape)
        assert self.config.recurrence is not None
        return self._named(recurrent_array(self.config.recurrence, prefix, kind))

    def factors(self, name: str) -> Floats | None:
        """What the rows of a small array are multiplied with, float32; None: nothing."""
        return conv_factors(self.config.recurrence) if name.endswith(".conv") else None

    def _named(self, piece: Piece) -> Piece:
        return replace(piece, name=self.config.own_name(piece.name))

    def _product(self, name: str) -> Product:
        config = self.config
        found = None if config.gemma4 is None else gemma4_product(config, name, self.rank, self.size)
        if found is not None:
            return found
        if name == "embedding":
            return self._table(config.embedding_name or f"{config.prefix}{_EMBEDDING}")
        if name == "head":
            return self._table(config.head_name)
        index, kind, *expert = name.split(".")
        prefix = f"{config.prefix}layers.{index}."
        found = None if config.latent is None else latent_product(config, config.latent, prefix, kind, expert)
        if found is not None:
            return found
        if expert:
            return self._of_expert(prefix, kind, int(expert[0]))
        if kind == "qkv":
            return self._qkv(prefix)
        if kind.startswith("mixer_"):
            assert config.recurrence is not None
            return recurrent_product(config.recurrence, config.hidden, prefix, kind)
        if kind.startswith("shared_"):
            return self._shared_expert(f"{prefix}mlp.shared_expert", kind)
        if kind == "out":
            inputs = config.heads * config.head_dim
            return self._back(f"{prefix}self_attn.o_proj", inputs, config.out_bias)
        if kind == "gate_up":
            return self._gate_up(prefix)
        if kind == "down":
            return self._back(f"{prefix}mlp.down_proj", config.intermediate, config.mlp_bias)
        experts = config.experts
        assert kind == "router"
        assert experts is not None
        router = f"{prefix}{experts.router}"
        biases = (Piece(_bias(router), (experts.count,)),) if experts.biased else ()
        return Product((Piece(router, (experts.count, config.hidden)),), biases)

    def _norm(self, name: str) -> Piece:
        config = self.config
        found = None if config.gemma4 is None else gemma4_norm(config, name)
        if found is not None:
            return found
        if name == "norm":
            return Piece(f"{config.prefix}norm.weight", (config.hidden,))
        index, kind = name.split(".")
        prefix = f"{config.prefix}layers.{index}."
        found = None if config.latent is None else latent_norm(config.latent, prefix, kind)
        if found is not None:
            return found
        if kind in ("q_norm", "k_norm"):
            return self._of_heads(f"{prefix}self_attn.{kind}.weight", kind == "q_norm")
        stored = {
            "before_attention": "input_layernorm",
            "before_mlp": "pre_feedforward_layernorm" if config.sandwich else "post_attention_layernorm",
            "after_attention": "post_attention_layernorm",
            "after_mlp": "post_feedforward_layernorm",
        }[kind]
        return Piece(f"{prefix}{stored}.weight", (config.hidden,))

    def _of_heads(self, name: str, queries: bool) -> Piece:
        """The norm of queries or keys; this rank's part of one over all heads."""
        config, dim = self.config, self.config.head_dim
        if not config.wide_norm:
            return Piece(name, (dim,))
        heads, own = (config.heads, self.heads) if queries else (config.kv_heads, self.kv_heads)
        first = self.rank * heads // self.size
        return self._piece(name, (heads * dim,), first * dim, (first + own) * dim)

    def _shared_expert(self, module: str, kind: str) -> Product:
        """A product of the expert that every token takes."""
        experts, hidden = self.config.experts, self.config.hidden
        assert experts is not None
        if kind == "shared_router":
            return Product((Piece(f"{module}_gate.weight", (1, hidden)),))
        if kind == "shared_down":
            return Product((Piece(f"{module}.down_proj.weight", (hidden, experts.shared)),))
        if self.config.fused_mlp:
            return Product((Piece(f"{module}.gate_up_proj.weight", (2 * experts.shared, hidden)),))
        parts = ("gate", "up") if self.config.gated else ("up",)
        return Product(tuple(Piece(f"{module}.{key}_proj.weight", (experts.shared, hidden)) for key in parts))

    def _table(self, name: str) -> Product:
        """This rank's rows of a table over the vocabulary."""
        config = self.config
        last = min(self.first_token + self.vocabulary, config.vocab_size)
        part = None if self.size == 1 else Slice(0, self.first_token, last)
        return Product((Piece(name, (config.vocab_size, config.hidden), part),))

    def _share(self, rows: int) -> tuple[int, int]:
        """This rank's rows [first, end) of rows that are split evenly."""
        share = rows // self.size
        return self.rank * share, (self.rank + 1) * share

    def _qkv(self, prefix: str) -> Product:
        config, dim = self.config, self.config.head_dim
        q_first, kv_first = self.rank * self.heads * dim, (self.rank * config.kv_heads // self.size) * dim
        shares = {
            "q": (config.heads * dim, q_first, q_first + self.heads * dim),
            "k": (config.kv_heads * dim, kv_first, kv_first + self.kv_heads * dim),
            "v": (config.kv_heads * dim, kv_first, kv_first + self.kv_heads * dim),
        }
        if config.output_gate:
            return self._gated_qkv(prefix)
        if config.fused:
            if self.size == 1:
                return Product((Piece(f"{prefix}self_attn.qkv_proj.weight", (self._rows(shares), config.hidden)),))
            pieces, offset = [], 0
            for rows, first, end in shares.values():
                shape, part = (self._rows(shares), config.hidden), Slice(0, offset + first, offset + end)
                pieces.append(Piece(f"{prefix}self_attn.qkv_proj.weight", shape, part))
                offset += rows
            return Product(tuple(pieces))
        weights = tuple(
            self._turned(key, self._piece(f"{prefix}self_attn.{key}_proj.weight", (rows, config.hidden), first, end))
            for key, (rows, first, end) in shares.items()
        )
        biases = tuple(
            self._turned(key, self._piece(f"{prefix}self_attn.{key}_proj.bias", (rows,), first, end))
            for key, (rows, first, end) in shares.items()
        )
        return Product(weights, biases if config.qkv_bias else ())

    def _turned(self, key: str, piece: Piece) -> Piece:
        """Rows of queries and keys whose neighbours are rotated together, in the order of halves."""
        config = self.config
        if not config.interleaved or key == "v":
            return piece
        turned = int(config.head_dim * config.ropes["all"].get("partial_rotary_factor", 1.0))
        head = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, config.head_dim)]
        return replace(
            piece,
            order=tuple(first + row for first in range(0, piece.size[0], config.head_dim) for row in head),
        )

    def _gated_qkv(self, prefix: str) -> Product:
        """Queries, keys, values, then the gates, which stand behind each head's query in the checkpoint."""
        config, dim = self.config, self.config.head_dim
        queries = f"{prefix}self_attn.q_proj"
        both = by_head(f"{queries}.weight", config.hidden, config.heads, (dim, dim))
        rows = config.kv_heads * dim
        others = [f"{prefix}self_attn.{key}_proj" for key in ("k", "v")]
        weights = (
            *both[: config.heads],
            *(Piece(f"{name}.weight", (rows, config.hidden)) for name in others),
            *both[config.heads :],
        )
        if not config.qkv_bias:
            return Product(weights)
        biases = by_head(f"{queries}.bias", None, config.heads, (dim, dim))
        own = (Piece(f"{name}.bias", (rows,)) for name in others)
        return Product(weights, (*biases[: config.heads], *own, *biases[config.heads :]))

    @staticmethod
    def _rows(shares: dict[str, tuple[int, int, int]]) -> int:
        return sum(rows for rows, _, _ in shares.values())

    def _piece(self, name: str, shape: tuple[int, ...], first: int, end: int) -> Piece:
        return Piece(name, shape, None if (first, end) == (0, shape[0]) else Slice(0, first, end))

    def _back(self, module: str, inputs: int, biased: bool) -> Product:
        """A product whose inputs the ranks split and whose outputs they sum. Rank 0 alone adds the bias."""
        hidden = self.config.hidden
        part = None if self.size == 1 else Slice(1, *self._share(inputs))
        biases = (Piece(f"{module}.bias", (hidden,)),) if biased and self.rank == 0 else ()
        return Product((Piece(f"{module}.weight", (hidden, inputs), part),), biases)

    def _gate_up(self, prefix: str) -> Product:
        config, rows = self.config, self.config.intermediate
        first, end = self._share(rows)
        if config.fused or config.fused_mlp:
            name, both = f"{prefix}mlp.gate_up_proj.weight", (2 * rows, config.hidden)
            if self.size == 1:
                return Product((Piece(name, both),))
            return Product(
                tuple(Piece(name, both, Slice(0, start, start + end - first)) for start in (first, rows + first))
            )
        modules = [f"{prefix}mlp.{key}_proj" for key in (("gate", "up") if config.gated else ("up",))]
        weights = tuple(self._piece(f"{module}.weight", (rows, config.hidden), first, end) for module in modules)
        biases = tuple(self._piece(f"{module}.bias", (rows,), first, end) for module in modules)
        return Product(weights, biases if config.mlp_bias else ())

    def _of_expert(self, prefix: str, kind: str, number: int) -> Product:
        """Every rank has a slice of every expert."""
        experts, hidden = self.config.experts, self.config.hidden
        assert experts is not None
        first, end = self._share(experts.size)
        gate, up, down = (f"{prefix}{name.format(number)}" for name in experts.names)
        if experts.stacked:
            place, stacked = (number, experts.count), f"{prefix}{experts.stem}."
            if kind == "down":
                part = None if self.size == 1 else Slice(1, first, end)
                return Product((Piece(f"{stacked}down_proj", (hidden, experts.size), part, place),))
            both = f"{stacked}gate_up_proj", (2 * experts.size, hidden)
            if self.size == 1:
                return Product((Piece(*both, None, place),))
            halves = [Slice(0, begin + first, begin + end) for begin in (0, experts.size)]
            return Product(tuple(Piece(*both, part, place) for part in halves))
        biases: tuple[Piece, ...] = ()
        if kind == "gate_up":
            wide = (experts.size, hidden)
            parts = (gate, up) if self.config.gated else (up,)
            if experts.biased:
                biases = tuple(self._piece(_bias(name), (experts.size,), first, end) for name in parts)
            return Product(tuple(self._piece(name, wide, first, end) for name in parts), biases)
        part = None if self.size == 1 else Slice(1, first, end)
        if experts.biased and self.rank == 0:
            biases = (Piece(_bias(down), (hidden,)),)
        return Product((Piece(down, (hidden, experts.size), part),), biases)


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def located(config: DecoderConfig, weights: Weights, untied: bool) -> DecoderConfig:
    """The description with the prefix of a checkpoint's names, and with the name of its head.

    Names begin with the family's prefix, or with that of another class of the same model: the one without a head, or
    the one that also reads images. As in transformers, a tied model uses a stored head that differs from the embedding.

    Args:
        untied: the config says that the head is not the embedding.

    Raises:
        StartError: the head is missing in the checkpoint.
    """
    prefixes = dict.fromkeys([config.prefix, *_PREFIXES])
    described = [replace(config, prefix=prefix) for prefix in prefixes]
    found = next((each for each in described if each.own_name(f"{each.prefix}{_EMBEDDING}") in weights), None)
    if found is None:
        return _without_embedding(config, weights, list(prefixes))
    config = found
    if config.experts is not None and any(
        config.own_name(f"{config.prefix}layers.{layer}.{config.experts.stem}.gate_up_proj") in weights
        for layer in range(config.layers)
    ):
        config = replace(config, experts=replace(config.experts, stacked=True))
    if config.latent is not None and lies_apart(config, weights):
        config = replace(config, latent=replace(config.latent, apart=True))
    head = _head(config, weights)
    if head is None:
        if untied:
            raise StartError(
                f"tensor '{config.head_name}' is missing, and config.json says that it is not the embedding "
                "(tie_word_embeddings false); is the checkpoint complete?"
            )
        return replace(config, tied=True)
    if config.tied and _differ(
        weights, config.own_name(f"{config.prefix}{_EMBEDDING}"), head, (config.vocab_size, config.hidden)
    ):
        log.warning("config.json ties the head to the embedding, but '%s' has values of its own, which are used", head)
        return replace(config, head_name=head, tied=False)
    return replace(config, head_name=head)


def _head(config: DecoderConfig, weights: Weights) -> str | None:
    prefix = config.prefix.removesuffix("model.")
    heads = dict.fromkeys([config.head_name, "lm_head.weight", f"{prefix}lm_head.weight"])
    return next((name for name in heads if name in weights), None)


def _without_embedding(config: DecoderConfig, weights: Weights, prefixes: Sequence[str]) -> DecoderConfig:
    """The description of a tied model whose embedding is stored under the head's name.

    safetensors keeps one of two names of a tensor. The description of any other checkpoint is not changed; reading its
    embedding raises that it is missing.
    """
    described = [replace(config, prefix=prefix) for prefix in prefixes]
    located = next((each for each in described if each.own_name(f"{each.prefix}norm.weight") in weights), config)
    head = _head(located, weights)
    return replace(located, embedding_name=head) if config.tied and head is not None else config


def _differ(weights: Weights, embedding: str, head: str, shape: Sequence[int]) -> bool:
    """Whether a stored head differs from the embedding, by comparing some of their rows."""
    weights.check(embedding, shape)
    weights.check(head, shape)
    first, second = (weights.read(name, shape) for name in (embedding, head))
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        step = max(1, shape[0] // 64)
        return not np.array_equal(first[::step], second[::step])
    return True


def _check_ranks(config: DecoderConfig, size: int) -> None:
    uneven = [
        f"{count} {what}"
        for what, count in (("attention heads", config.heads), ("intermediate columns", config.intermediate))
        if count % size
    ]
    kv_heads = [config.kv_heads] if config.gemma4 is None else [shape.kv_heads for shape in config.gemma4.shapes]
    uneven += [f"{count} key heads" for count in dict.fromkeys(kv_heads) if max(count, size) % min(count, size)]
    if config.experts is not None and config.experts.size % size:
        uneven.append(f"{config.experts.size} columns of an expert")
    if uneven:
        raise StartError(
            f"--tensor-parallel {size} does not divide the model's {', '.join(uneven)}; use a number that does"
        )
