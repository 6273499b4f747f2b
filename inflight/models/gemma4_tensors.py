"""The tensors of Gemma 4's checkpoints that other families do not have, or have in other sizes.

Products beside those of `decoder_tensors`: own_in, own_table (a table whose rows tokens read); of layer n: n.own_gate,
n.own_out. Norms: own_norm, and n.after_own, n.after_dense, n.before_experts, n.after_experts. Arrays: n.scalar,
n.router_scale, n.expert_factors.
"""

from __future__ import annotations

from inflight.checkpoint import Slice
from inflight.models.description import DecoderConfig
from inflight.models.gemma4_shapes import LayerShape
from inflight.models.pieces import Piece, Product

_NORMS = {
    "after_own": "post_per_layer_input_norm",
    "after_dense": "post_feedforward_layernorm_1",
    "before_experts": "pre_feedforward_layernorm_2",
    "after_experts": "post_feedforward_layernorm_2",
}


def gemma4_product(config: DecoderConfig, name: str, rank: int = 0, size: int = 1) -> Product | None:
    """A rank's part of the tensors of a product; None: it is as in other families."""
    own = config.gemma4
    assert own is not None
    hidden, width = config.hidden, own.own_size * config.layers
    if name == "own_in":
        return Product((Piece(f"{config.prefix}per_layer_model_projection.weight", (width, hidden)),))
    if name == "own_table":
        return Product((Piece(f"{config.prefix}embed_tokens_per_layer.weight", (own.own_rows, width)),))
    if "." not in name:
        return None
    index, kind, *expert = name.split(".")
    prefix, shape = f"{config.prefix}layers.{index}.", own.shapes[int(index)]
    if kind == "qkv":
        return _qkv(config, prefix, shape, rank, size)
    columns = shape.inner // size
    single = {
        "out": ("self_attn.o_proj", hidden, config.heads * shape.dim),
        "down": ("mlp.down_proj", hidden, shape.inner),
        "own_gate": ("per_layer_input_gate", own.own_size, hidden),
        "own_out": ("per_layer_projection", hidden, own.own_size),
    }
    if kind == "gate_up" and not expert:
        wide, share = (shape.inner, hidden), Slice(0, rank * columns, (rank + 1) * columns)
        halves = [f"{prefix}mlp.{half}_proj.weight" for half in ("gate", "up")]
        return Product(tuple(Piece(half, wide, None if size == 1 else share) for half in halves))
    if kind not in single or expert:
        return None
    module, rows, inputs = single[kind]
    biased, divided = kind == "out" and config.out_bias and rank == 0, size > 1 and not kind.startswith("own")
    part = Slice(1, rank * inputs // size, (rank + 1) * inputs // size) if divided else None
    biases = (Piece(f"{prefix}{module}.bias", (rows,)),) if biased else ()
    return Product((Piece(f"{prefix}{module}.weight", (rows, inputs), part),), biases)


def _qkv(config: DecoderConfig, prefix: str, shape: LayerShape, rank: int, size: int) -> Product:
    """Queries, and keys and values of a layer that has its own; values may be what keys are."""

    def rows(heads: int) -> tuple[int, Slice | None]:
        first, own = rank * heads // size, max(1, heads // size)
        return heads * shape.dim, None if size == 1 else Slice(0, first * shape.dim, (first + own) * shape.dim)

    parts = [("q", *rows(config.heads))]
    if shape.source is None:
        keys = rows(shape.kv_heads)
        parts += [("k", *keys), ("k" if shape.twice else "v", *keys)]
    modules = [(f"{prefix}self_attn.{name}_proj", count, part) for name, count, part in parts]
    biases = tuple(Piece(f"{module}.bias", (count,), part) for module, count, part in modules)
    weights = tuple(Piece(f"{module}.weight", (count, config.hidden), part) for module, count, part in modules)
    return Product(weights, biases if config.qkv_bias else ())


def gemma4_norm(config: DecoderConfig, name: str) -> Piece | None:
    """The tensor of a norm; None: it is as in other families."""
    own = config.gemma4
    assert own is not None
    if name == "own_norm":
        return Piece(f"{config.prefix}per_layer_projection_norm.weight", (own.own_size,))
    index, _, kind = name.partition(".")
    prefix = f"{config.prefix}layers.{index}."
    if kind in ("q_norm", "k_norm"):
        return Piece(f"{prefix}self_attn.{kind}.weight", (own.shapes[int(index)].dim,))
    return Piece(f"{prefix}{_NORMS[kind]}.weight", (config.hidden,)) if kind in _NORMS else None


def gemma4_array(config: DecoderConfig, name: str) -> Piece | None:
    """The tensor of a small array; None: it is as in other families."""
    index, _, kind = name.partition(".")
    experts = 0 if config.experts is None else config.experts.count
    stored = {
        "scalar": ("layer_scalar", 1),
        "router_scale": ("router.scale", config.hidden),
        "expert_factors": ("router.per_expert_scale", experts),
    }.get(kind)
    return None if stored is None else Piece(f"{config.prefix}layers.{index}.{stored[0]}", (stored[1],))
