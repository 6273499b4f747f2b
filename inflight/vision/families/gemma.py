"""Gemma 3: one square picture, whose tokens see each other."""

from __future__ import annotations

from inflight.contract import Array, Detail, Grid
from inflight.vision.families.base import Family
from inflight.vision.families.pixels import Normal, resized
from inflight.vision.towers.base import Prepared


class Gemma3(Family):
    """The grid is always (1, 1). Pan and scan, off by default in the processor, is not done."""

    types = ("gemma3",)
    usual_token = "<image_soft_token>"
    whole = True
    defaults = {
        "resample": 2,
        "image_mean": 0.5,
        "image_std": 0.5,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }

    def read(self) -> None:
        self._count = int(self.config.get("mm_tokens_per_image", 256))
        self._side = int(self.settings["size"]["height"]), int(self.settings["size"]["width"])
        self._normal = Normal.of(self.settings)
        self.placeholder = "<start_of_image>"

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        return Grid(1, 1)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        scaled = resized(image, *self._side, self.settings["resample"])
        return Prepared(Grid(1, 1), self._normal(scaled)[None], (image.shape[0], image.shape[1]))

    def text(self, grid: Grid) -> str:
        return f"\n\n<start_of_image>{self.token * self._count}<end_of_image>\n\n"

    def runs(self, grid: Grid) -> list[int]:
        return [self._count]
