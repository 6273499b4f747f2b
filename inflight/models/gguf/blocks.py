"""llama.cpp's blocks of integers as `Quantised`. Layouts: ggml-common.h of ggml-org/llama.cpp.

All numbers in a block are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from inflight.nn import to_array
from inflight.tensors import Quantised


def quantised(rows: np.ndarray, type: Type) -> Quantised:
    """A weight [n, k] of its rows' bytes, uint8 [n, bytes]; the type is one of `BLOCKS`."""
    blocks = torch.from_numpy(rows).view(rows.shape[0], -1, GGML_QUANT_SIZES[type][1])
    return BLOCKS[type](blocks)


def _half(octets: torch.Tensor) -> torch.Tensor:
    """float16 [..., 1] in two bytes, as float32."""
    return octets.contiguous().view(torch.float16).float()


def _q8_0(blocks: torch.Tensor) -> Quantised:
    """32 values: a scale, int8 codes around 0."""
    codes = (blocks[..., 2:] ^ 128).flatten(1)
    return Quantised(8, 32, to_array(codes), to_array(_half(blocks[..., :2]).squeeze(-1)))


def _q4_0(blocks: torch.Tensor) -> Quantised:
    """32 values: a scale, 16 bytes with the first half in the low nibbles and the second one in the high ones."""
    codes = _nibbles(blocks[..., 2:]).flatten(1)
    return Quantised(4, 32, to_array(codes), to_array(_half(blocks[..., :2]).squeeze(-1)))


def _q4_k(blocks: torch.Tensor) -> Quantised:
    """256 values in 8 groups: w = d * scale * code - dmin * minimum, with scales and minima of 6 bits."""
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], dim=-1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], dim=-1)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Quantised(
        4,
        32,
        to_array(codes.flatten(1)),
        to_array((_half(blocks[..., :2]) * scales).flatten(1)),
        to_array((_half(blocks[..., 2:4]) * minima).flatten(1)),
    )


def _nibbles(octets: torch.Tensor) -> torch.Tensor:
    """[..., m] -> [..., 2 m]: all low nibbles, then all high ones."""
    return torch.cat([octets & 15, octets >> 4], dim=-1)


BLOCKS: dict[Type, Callable[[torch.Tensor], Quantised]] = {Type.Q8_0: _q8_0, Type.Q4_0: _q4_0, Type.Q4_K: _q4_k}
"""Types that are groups of integers of 4 or 8 bits."""
