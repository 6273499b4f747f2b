"""What passes between the preparation of an image, its tower, and the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from inflight.contract import Array, Grid


@dataclass(frozen=True)
class Prepared:
    """One image, cut, scaled and normalised as its family wants it.

    Attributes:
        grid: of its tokens; what it says is the family's (`inflight.vision.families`).
        pixels: float32 [tiles, 3, height, width], C-contiguous; tiles in the order of their tokens. Families without
            tiles have one of the image's own size. Cutting into patches is the tower's work.
        size: height and width of the image in front of the preparation (LLaVA-NeXT cuts padding by it).
    """

    grid: Grid
    pixels: Array
    size: tuple[int, int]


@dataclass(frozen=True)
class TowerOutput:
    """Attributes:
    rows: float32 [N, hidden], one for each of the image's tokens, in order.
    added: as `EncodedImage.added`, each float32 [N, hidden].
    """

    rows: Array
    added: tuple[Array, ...] = ()


class Tower(ABC):
    """A vision tower with its join to the language model, loaded. Used by one thread.

    A call computes one image, a tile after the other, so that shapes, and with them bits, depend on the image alone.

    Attributes:
        identity: what computes it and in which type, with the version, such as `torch 2.13.0 float32`.
    """

    identity: str

    @abstractmethod
    def run(self, prepared: Prepared) -> TowerOutput:
        """Encodes one image."""
