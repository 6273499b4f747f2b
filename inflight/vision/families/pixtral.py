"""Mistral 3 and Pixtral: one picture of its own form, line by line."""

from __future__ import annotations

from inflight.contract import Array, Detail, Grid
from inflight.vision.families.base import CLIP_MEAN, CLIP_STD, Family
from inflight.vision.families.pixels import Normal, resized
from inflight.vision.towers.base import Prepared

LOW = 256
"""Tokens of an image of low detail."""


class Pixtral(Family):
    """The grid: rows and columns of merged patches. A line ends with a token of the text."""

    types = ("mistral3",)
    usual_token = "[IMG]"
    defaults = {
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 1024},
    }

    def read(self) -> None:
        # Whatever patches the image processor's file has: transformers' processor tells it merged ones.
        self._unit = int(self.vision["patch_size"]) * int(self.config.get("spatial_merge_size", 1))
        size = self.settings["size"]
        self._longest = int(size["longest_edge"] if "longest_edge" in size else size["height"])
        self._normal = Normal.of(self.settings)

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        height, width = self._sides(height, width, detail)
        return Grid(height // self._unit, width // self._unit)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        scaled = resized(image, *self._sides(height, width, detail), self.settings["resample"])
        return Prepared(self.grid(height, width, detail), self._normal(scaled)[None], (height, width))

    def text(self, grid: Grid) -> str:
        line = self.token * grid.columns
        return "[IMG_BREAK]".join([line] * grid.rows) + "[IMG_END]"

    def runs(self, grid: Grid) -> list[int]:
        return [grid.columns] * grid.rows

    def _sides(self, height: int, width: int, detail: Detail) -> tuple[int, int]:
        """Height and width as multiples of a patch, the longer one at most the processor's and short enough for the
        limit of tokens."""
        most = min(self.max_tokens, LOW) if detail == "low" else self.max_tokens
        longest = self._longest
        while True:
            sides = self._within(height, width, longest)
            if sides[0] * sides[1] <= most * self._unit**2 or longest <= self._unit:
                return sides
            longest = min(longest, max(sides)) - self._unit

    def _within(self, height: int, width: int, longest: int) -> tuple[int, int]:
        shrink = max(height, width) / longest
        if shrink > 1:
            height, width = max(1, int(height / shrink)), max(1, int(width / shrink))
        unit = self._unit
        return ((height - 1) // unit + 1) * unit, ((width - 1) // unit + 1) * unit
