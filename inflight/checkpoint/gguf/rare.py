"""Block types that no kernel here has: they are converted to 8-bit integers in groups of 32 when they are read.

llama.cpp's own Python library decodes them. It is imported only for them.
"""

from __future__ import annotations

import logging

import numpy as np

from inflight.checkpoint.mapped import Bytes
from inflight.errors import StartError
from inflight.tensors import Quantised, quantise

log = logging.getLogger("inflight")

RARE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")
_ROWS = 1024  # rows that are converted to floats at a time
_GROUP = 32
_said: list[str] = []


def as_integers(type: str, shape: tuple[int, int], rows: Bytes) -> Quantised:
    """Converts rows of blocks to a weight [n, k] of 8-bit integers in groups of 32.

    Raises:
        StartError: the library is not installed.
    """
    try:
        import gguf  # large, and needed for few files only
    except ImportError:
        raise StartError(
            f"reading tensors of type {type} needs the package gguf: pip install gguf; files of Q4_K_M or IQ4_XS need "
            "nothing"
        ) from None
    if type not in _said:
        _said.append(type)
        log.warning("tensors of type %s are computed as integers of 8 bits, and take the memory of those", type)
    kind = gguf.GGMLQuantizationType[type]
    n, k = shape
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, k // _GROUP), np.float32)
    for first in range(0, n, _ROWS):
        piece = quantise(gguf.dequantize(rows[first : first + _ROWS], kind).reshape(-1, k), 8, _GROUP)
        codes[first : first + _ROWS], scales[first : first + _ROWS] = piece.codes, piece.scales
    return Quantised(8, _GROUP, codes, scales)
