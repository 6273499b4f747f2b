"""The bytes of tokens that are parts of characters."""

from __future__ import annotations

import re

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in set(_SHOWN)]
_BYTES = {chr(byte): byte for byte in _SHOWN} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}
"""GPT-2's letters for bytes: those that can be shown stand for themselves, the others for U+0100 and on."""


def bytes_of(piece: str) -> bytes:
    """The bytes of a token as its vocabulary writes it: `<0xE2>` for one byte, or GPT-2's letters."""
    fallback = _FALLBACK.fullmatch(piece)
    if fallback is not None:
        return bytes([int(fallback[1], 16)])
    if all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece)
    return piece.encode()
