"""Scaling and normalising as transformers' image processors do it with Pillow, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.contract import Array


def resized(image: Array, height: int, width: int, filter: int) -> Array:
    """A scaled copy, uint8 [height, width, 3].

    Args:
        image: uint8 [h, w, 3].
        filter: Pillow's number of a resampling filter, as processors' files have it.
    """
    from PIL import Image  # in the worker only

    return np.asarray(Image.fromarray(image).resize((width, height), resample=Image.Resampling(filter)))


def tiles_of(image: Array, side: int) -> list[Array]:
    """The tiles of an image whose sides are multiples of `side`, row by row."""
    height, width = image.shape[:2]
    return [
        image[top : top + side, left : left + side] for top in range(0, height, side) for left in range(0, width, side)
    ]


@dataclass(frozen=True)
class Normal:
    """(value * scale - mean) / deviation for each channel.

    Attributes:
        table: float32 [3, 256], the results for all values.
    """

    table: Array

    @classmethod
    def of(cls, processor: Any) -> Normal:
        """As a processor's settings say."""
        values = np.arange(256, dtype=np.float64)
        if processor.get("do_rescale", True):
            values *= processor["rescale_factor"]
        table: Array = np.repeat(values.astype(np.float32)[None], 3, axis=0)
        if processor.get("do_normalize", True):
            mean, deviation = (_channels(processor[name]) for name in ("image_mean", "image_std"))
            table = (table - mean) / deviation
        return cls(table)

    def __call__(self, image: Array) -> Array:
        """float32 [3, height, width] of uint8 [height, width, 3]."""
        return np.stack([table[image[:, :, channel]] for channel, table in enumerate(self.table)])


def _channels(values: float | Sequence[float]) -> Array:
    return np.broadcast_to(np.asarray(values, np.float32), (3,))[:, None]
