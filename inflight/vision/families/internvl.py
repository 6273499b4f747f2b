"""InternVL 3 and 3.5: tiles of one size in the arrangement nearest to the picture's form, then a thumbnail."""

from __future__ import annotations

import numpy as np

from inflight.contract import Array, Detail, Grid
from inflight.vision.families.base import CLIP, Family
from inflight.vision.families.pixels import Normal, resized, tiles_of
from inflight.vision.towers.base import Prepared


class InternVl(Family):
    """The grid: rows and columns of tiles; (1, 1): the picture as a whole, without tiles.

    Pictures are cut whatever `crop_to_patches` in the image processor's file says: transformers' processor sets it."""

    types = ("internvl",)
    usual_token = "<IMG_CONTEXT>"
    defaults = {
        **CLIP,
        "size": {"height": 448, "width": 448},
        "min_patches": 1,
        "max_patches": 12,
    }

    def read(self) -> None:
        self._side = int(self.settings["size"]["height"])
        patch = self.vision["patch_size"]
        patch = int(patch[0] if isinstance(patch, list) else patch)
        self._count = int((self._side // patch) ** 2 * float(self.config.get("downsample_ratio", 0.5)) ** 2)
        self._normal = Normal.of(self.settings)

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        most = min(int(self.settings["max_patches"]), self.max_tokens // self._count - 1)
        if detail == "low" or most < 2:
            return Grid(1, 1)
        return self._nearest(height, width, min(int(self.settings["min_patches"]), most), most)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        grid, side, resample = self.grid(height, width, detail), self._side, self.settings["resample"]
        tiles = []
        if grid != (1, 1):
            tiles = tiles_of(resized(image, grid.rows * side, grid.columns * side, resample), side)
        tiles.append(resized(image, side, side, resample))
        return Prepared(grid, np.stack([self._normal(tile) for tile in tiles]), (height, width))

    def text(self, grid: Grid) -> str:
        return f"<img>{self.token * self.runs(grid)[0]}</img>"

    def runs(self, grid: Grid) -> list[int]:
        tiles = 1 if grid == (1, 1) else grid.rows * grid.columns + 1
        return [tiles * self._count]

    def _nearest(self, height: int, width: int, least: int, most: int) -> Grid:
        """The arrangement of `least` to `most` tiles whose form is nearest to the picture's. Of equally near ones the
        larger, unless the picture has less than half of its pixels."""
        forms = [
            Grid(rows, columns)
            for columns in range(1, most + 1)
            for rows in range(1, most + 1)
            if least <= rows * columns <= most
        ]
        best, distance = Grid(1, 1), float("inf")
        for form in sorted(forms, key=lambda form: form.rows * form.columns):
            off = abs(width / height - form.columns / form.rows)
            large = height * width > 0.5 * self._side**2 * form.rows * form.columns
            if off < distance or (off == distance and large):
                best, distance = form, off
        return best
