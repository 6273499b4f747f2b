"""The tensors of multi-head latent attention.

Of layer n: n.q, or n.q_a and n.q_b with the norm n.q_a_norm; n.kv_a with the norm n.kv_a_norm; of head h n.k_b.h, which
makes of the head's query one that is compared with latents, and n.v_b.h, which makes its values of latents; n.out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from inflight.checkpoint import Slice, Weights
from inflight.models.description import DecoderConfig, Latent
from inflight.models.pieces import Piece, Product


def latent_product(
    config: DecoderConfig, latent: Latent, prefix: str, kind: str, expert: Sequence[str]
) -> Product | None:
    """A product of a layer; None: it is none of attention.

    Args:
        expert: what stands behind the kind: the number of a head.
    """
    module, hidden = f"{prefix}self_attn.", config.hidden
    if kind in ("k_b", "v_b"):
        return Product((_of_head(config, latent, module, kind, int(expert[0])),))
    queries = config.heads * latent.head
    inputs = latent.query_rank or hidden
    shapes = {
        "q": ("q_proj", queries, inputs),
        "q_a": ("q_a_proj", latent.query_rank, hidden),
        "q_b": ("q_b_proj", queries, inputs),
        "kv_a": ("kv_a_proj_with_mqa", latent.rank + latent.rotary, hidden),
        "out": ("o_proj", hidden, config.heads * latent.value),
    }
    if kind not in shapes:
        return None
    name, rows, columns = shapes[kind]
    order: tuple[int, ...] = ()
    if config.interleaved and kind in ("q", "q_b"):
        order = _order(config.heads, latent.plain, latent.rotary)
    if config.interleaved and kind == "kv_a":
        order = _order(1, latent.rank, latent.rotary)
    weight = Piece(f"{module}{name}.weight", (rows, columns), order=order)
    biased = config.qkv_bias if kind in ("q_a", "kv_a") else config.out_bias and kind == "out"
    return Product((weight,), (replace(weight, name=f"{module}{name}.bias", shape=(rows,)),) if biased else ())


def latent_norm(latent: Latent, prefix: str, kind: str) -> Piece | None:
    """A norm of a layer; None: it is none of attention."""
    size = {"q_a_norm": latent.query_rank, "kv_a_norm": latent.rank}.get(kind)
    return None if size is None else Piece(f"{prefix}self_attn.{kind.replace('norm', 'layernorm')}.weight", (size,))


def lies_apart(config: DecoderConfig, weights: Weights) -> bool:
    """Whether keys and values are made of latents by tensors of each head (GGUF)."""
    return config.own_name(f"{config.prefix}layers.0.self_attn.k_b_proj.0.weight") in weights


def _of_head(config: DecoderConfig, latent: Latent, module: str, kind: str, head: int) -> Piece:
    keys = kind == "k_b"
    if latent.apart:
        shape = (latent.rank, latent.plain) if keys else (latent.value, latent.rank)
        return Piece(f"{module}{kind}_proj.{head}.weight", shape)
    both = latent.plain + latent.value
    first = head * both + (0 if keys else latent.plain)
    part = Slice(0, first, first + (latent.plain if keys else latent.value))
    return Piece(f"{module}kv_b_proj.weight", (config.heads * both, latent.rank), part, transposed=keys)


def _order(heads: int, plain: int, rotary: int) -> tuple[int, ...]:
    """Rows of heads whose last ones are rotated together with their neighbours, in the order of halves."""
    head = [*range(plain), *range(plain, plain + rotary, 2), *range(plain + 1, plain + rotary, 2)]
    return tuple(first + row for first in range(0, heads * len(head), len(head)) for row in head)
