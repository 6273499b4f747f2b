"""What a layer keeps of a sequence: entries of the paged cache, another layer's entries, or a state of fixed size.

A model gives the list of its layers' states. Outside a rank only sums are known: the bytes of a block of the paged
cache, and of all recurrent states of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paged:
    """Keys and values of every token. Attributes: block_bytes: of one block of the cache."""

    block_bytes: int


@dataclass(frozen=True)
class Shared:
    """The entries of another layer, which this one reads. Attributes: layer: its number."""

    layer: int


@dataclass(frozen=True)
class Recurrent:
    """Arrays of float32 that every token changes. Attributes: arrays: shapes by name."""

    arrays: Mapping[str, tuple[int, ...]]


LayerState = Paged | Shared | Recurrent


def block_bytes(states: Sequence[LayerState]) -> int:
    """Bytes of one block of the paged cache over all layers."""
    return sum(state.block_bytes for state in states if isinstance(state, Paged))
