"""Weights as arrays: floats, integers with scales, and blocks as GGUF files hold them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from inflight.tensors.blocks import BLOCKS, BlockForm, Blocks
from inflight.tensors.floats import BFLOAT16, FLOAT_DTYPES, Floats, widened
from inflight.tensors.quantised import Quantised, quantise, stack

Weight: TypeAlias = Floats | Quantised | Blocks
"""A matrix [n, k] of one of the three kinds."""


def ordered(weight: Weight, order: Sequence[int]) -> Weight:
    """The outputs (rows) of these numbers, in this order."""
    return weight[np.asarray(order)] if isinstance(weight, np.ndarray) else weight.ordered(order)


__all__ = [
    "BFLOAT16",
    "BLOCKS",
    "FLOAT_DTYPES",
    "BlockForm",
    "Blocks",
    "Floats",
    "Quantised",
    "Weight",
    "ordered",
    "quantise",
    "stack",
    "widened",
]
