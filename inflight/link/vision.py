"""Messages between the server and the process that reads a model's images."""

from __future__ import annotations

import msgspec

from inflight.config import GeneratorConfig
from inflight.contract import Detail
from inflight.link.values import WireArray


class LoadVision(msgspec.Struct, array_like=True, frozen=True, tag=22):
    """Server to worker, first of all: this process reads the images of a model."""

    config: GeneratorConfig


class VisionReady(msgspec.Struct, array_like=True, frozen=True, tag=23):
    """Worker to server: the tower is loaded.

    Attributes:
        identity: what computes it and in which type, with the versions of libraries.
    """

    identity: str


class EncodeImage(msgspec.Struct, array_like=True, frozen=True, tag=24):
    """Server to worker: an image to encode.

    Attributes:
        image: bytes of a file, or an array, uint8 [height, width, 3].
        detail, alone: as in `Encoder.encode`.
    """

    number: int
    image: WireArray
    detail: Detail
    alone: bool


class ImageEncoded(msgspec.Struct, array_like=True, frozen=True, tag=25):
    """Worker to server: an image's rows, and behind them those that are added to deeper layers."""

    number: int
    grid: tuple[int, int]
    rows: list[WireArray]


class ImageFailed(msgspec.Struct, array_like=True, frozen=True, tag=26):
    """Worker to server: an image's error, by its kind (`inflight.errors.error_from_wire`) and text."""

    number: int
    kind: str
    text: str
