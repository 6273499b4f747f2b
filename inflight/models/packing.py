"""How checkpoints pack integers into int32 words, undone.

All formats fill a word from its lowest bits. Words are read as this machine's bytes, so it must be little-endian, as
every machine that torch runs on is.
"""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [r, c * 32 / bits] of words int32 [r, c], packed along the last dimension.

    Args:
        bits: 4 or 8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    codes = torch.empty(*octets.shape, 2, dtype=torch.uint8)
    codes[..., 0] = octets & 15
    codes[..., 1] = octets >> 4
    return codes.flatten(-2)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [8 * c, r] of 4 bits, transposed, of words int32 [r, c] in AutoAWQ's GEMM packing.

    The nibbles of a word, the lowest first, are the outputs 0, 2, 4, 6, 1, 3, 5, 7: its bytes hold the outputs 0 and 2,
    4 and 6, 1 and 3, 5 and 7.
    """
    rows, columns = words.shape
    octets = words.contiguous().view(torch.uint8).t().contiguous().view(columns, 4, rows)
    low, high = octets & 15, octets >> 4
    codes = torch.empty(columns, 8, rows, dtype=torch.uint8)
    codes[:, 0::4], codes[:, 2::4] = low[:, :2], high[:, :2]
    codes[:, 1::4], codes[:, 3::4] = low[:, 2:], high[:, 2:]
    return codes.view(8 * columns, rows)


def unsigned(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes around 0 as uint8 ones around 128."""
    return codes.view(torch.uint8) ^ 128
