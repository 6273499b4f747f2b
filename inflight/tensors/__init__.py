"""Weights as arrays: floats, integers with scales, and blocks as GGUF files hold them. No torch."""

from __future__ import annotations

from typing import TypeAlias

from inflight.tensors.blocks import BLOCKS, BlockForm, Blocks
from inflight.tensors.floats import BFLOAT16, FLOAT_DTYPES, Floats, widened
from inflight.tensors.quantised import Quantised, quantise, stack

Weight: TypeAlias = Floats | Quantised | Blocks
"""A matrix [n, k] of one of the three kinds."""

__all__ = [
    "BFLOAT16",
    "BLOCKS",
    "FLOAT_DTYPES",
    "BlockForm",
    "Blocks",
    "Floats",
    "Quantised",
    "Weight",
    "quantise",
    "stack",
    "widened",
]
