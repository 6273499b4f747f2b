"""What families have in common that read a picture in its own form, as rows and columns of patches."""

from __future__ import annotations

from abc import abstractmethod

from inflight.contract import Array, Detail, Grid
from inflight.vision.families.base import Family
from inflight.vision.families.pixels import Normal, resized
from inflight.vision.towers.base import Prepared

LOW = 256
"""Tokens of an image of low detail."""


class Patches(Family):
    """The grid: rows and columns of merged patches.

    Attributes:
        unit: pixels of a merged patch's side.
        normal: as the image processor's settings say.
    """

    unit: int
    normal: Normal

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        height, width = self.sides(height, width, self._most(detail))
        return Grid(height // self.unit, width // self.unit)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        sides = self.sides(height, width, self._most(detail))
        scaled = resized(image, *sides, self.settings["resample"])
        grid = Grid(sides[0] // self.unit, sides[1] // self.unit)
        return Prepared(grid, self.normal(scaled)[None], (height, width))

    def _most(self, detail: Detail) -> int:
        return min(self.max_tokens, LOW) if detail == "low" else self.max_tokens

    @abstractmethod
    def sides(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Height and width to scale a picture to, multiples of `unit`. Args: most: merged patches."""
