"""What makes two images the same: all that their rows depend on."""

from __future__ import annotations

import asyncio
from hashlib import blake2b

import numpy as np

from inflight.config import VisionConfig
from inflight.contract import Media

LONG = 1 << 20
"""Bytes from which a digest is computed beside the event loop; hashing them takes about a millisecond."""


async def digest(image: Media, identity: str, limits: VisionConfig, alone: bool) -> bytes:
    """16 bytes of blake2b, a hash as strong as the prefix cache's: whoever could make two images of one digest would
    be shown another's answers.

    Args:
        image: has `data` or `pixels`. A file and its pixels are two images.
        identity: as `Encoder.identity`.
        alone: as in `Encoder.encode`; True where it does not matter.
    """
    pixels = image.pixels
    fields = (
        identity,
        image.kind,
        "low" if image.detail == "low" else "high",  # auto is high
        f"{limits.image_max_tokens} tokens, {limits.image_max_pixels} pixels",
        "alone" if alone else "one of several",
        "file" if pixels is None else f"pixels {pixels.shape}",
    )
    state = blake2b(digest_size=16)
    for text in fields:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    content = image.data if pixels is None else np.ascontiguousarray(pixels).data.cast("B")
    assert content is not None
    if len(content) < LONG:
        state.update(content)
    else:
        await asyncio.to_thread(state.update, content)
    return state.digest()
