"""Mistral 3 and Pixtral: one picture of its own form, line by line."""

from __future__ import annotations

from inflight.contract import Grid
from inflight.vision.families.base import CLIP
from inflight.vision.families.patches import Patches
from inflight.vision.families.pixels import Normal


class Pixtral(Patches):
    """The grid: rows and columns of merged patches. A line ends with a token of the text."""

    types = ("mistral3",)
    usual_token = "[IMG]"
    defaults = {
        **CLIP,
        "size": {"longest_edge": 1024},
    }

    def read(self) -> None:
        # Whatever patches the image processor's file has: transformers' processor tells it merged ones.
        self.unit = int(self.vision["patch_size"]) * int(self.config.get("spatial_merge_size", 1))
        size = self.settings["size"]
        self._longest = int(size["longest_edge"] if "longest_edge" in size else size["height"])
        self.normal = Normal.of(self.settings)

    def text(self, grid: Grid) -> str:
        line = self.token * grid.columns
        return "[IMG_BREAK]".join([line] * grid.rows) + "[IMG_END]"

    def runs(self, grid: Grid) -> list[int]:
        return [grid.columns] * grid.rows

    def sides(self, height: int, width: int, most: int) -> tuple[int, int]:
        """The longer side is at most the processor's, and short enough for `most`."""
        longest = self._longest
        while True:
            sides = self._within(height, width, longest)
            if sides[0] * sides[1] <= most * self.unit**2 or longest <= self.unit:
                return sides
            longest = min(longest, max(sides)) - self.unit

    def _within(self, height: int, width: int, longest: int) -> tuple[int, int]:
        shrink = max(height, width) / longest
        if shrink > 1:
            height, width = max(1, int(height / shrink)), max(1, int(width / shrink))
        unit = self.unit
        return ((height - 1) // unit + 1) * unit, ((width - 1) // unit + 1) * unit
