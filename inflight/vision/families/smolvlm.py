"""SmolVLM, SmolVLM2 and Idefics3: tiles of one size in rows and columns, and one of the whole image behind them."""

from __future__ import annotations

from math import ceil

import numpy as np

from inflight.contract import Array, Detail, Grid
from inflight.errors import StartError
from inflight.vision.families.base import Family
from inflight.vision.families.pixels import Normal, resized, tiles_of
from inflight.vision.towers.base import Prepared

LARGEST = 4096
"""Longest side that the processor ever makes."""

MARK = "<fake_token_around_image>"
WHOLE = "<global-img>"


class SmolVlm(Family):
    """The grid: rows and columns of tiles; (1, 1): the image as a whole, without tiles."""

    types = ("idefics3", "smolvlm")
    usual_token = "<image>"
    defaults = {
        "resample": 1,
        "image_mean": 0.5,
        "image_std": 0.5,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
        "do_resize": True,
        "do_image_splitting": True,
    }

    def read(self) -> None:
        self._tile = int(self.settings["max_image_size"]["longest_edge"])
        patch, image = int(self.vision["patch_size"]), int(self.vision["image_size"])
        if self._tile != image:
            raise StartError(
                f"preprocessor_config.json cuts tiles of {self._tile} pixels, and the tower in config.json takes "
                f"{image}; both must be the same"
            )
        self._count = (self._tile // patch // int(self.config.get("scale_factor", 2))) ** 2
        self._normal = Normal.of(self.settings)
        self._longest = int(self.settings["size"]["longest_edge"])

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        longest = self._longest_edge(height, width, detail)
        return Grid(1, 1) if longest is None else self._tiles(height, width, longest)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        longest = self._longest_edge(height, width, detail)
        if self.settings["do_resize"]:
            image = self._scaled(image, *self._first_size(height, width, longest or self._longest))
        if longest is None:
            grid, tiles = Grid(1, 1), [self._square(image)]
        else:
            grid = self._tiles(height, width, longest)
            image = self._scaled(image, grid.rows * self._tile, grid.columns * self._tile)
            tiles = [] if grid == (1, 1) else tiles_of(image, self._tile)
            tiles.append(self._square(image))
        return Prepared(grid, np.stack([self._normal(tile) for tile in tiles]), (height, width))

    def text(self, grid: Grid) -> str:
        tokens = self.token * self._count
        whole = f"{MARK}{WHOLE}{tokens}{MARK}"
        if grid == (1, 1):
            return whole
        rows = (
            "".join(f"{MARK}<row_{row}_col_{column}>{tokens}" for column in range(1, grid.columns + 1))
            for row in range(1, grid.rows + 1)
        )
        return "\n".join(rows) + "\n\n" + whole

    def runs(self, grid: Grid) -> list[int]:
        return [self._count] * (1 if grid == (1, 1) else grid.rows * grid.columns + 1)

    def _longest_edge(self, height: int, width: int, detail: Detail) -> int | None:
        """The longest side to scale to in front of the cutting; None: nothing is cut.

        The limit of tokens takes whole tiles away from the longest side, until the rest fit."""
        if detail == "low" or not self.settings["do_image_splitting"]:
            return None
        longest = self._longest
        while longest > self._tile:
            if sum(self.runs(self._tiles(height, width, longest))) <= self.max_tokens:
                return longest
            longest -= self._tile
        return longest if longest == self._longest else None

    def _first_size(self, height: int, width: int, longest: int) -> tuple[int, int]:
        """Height and width with the longest side scaled to `longest`, the other one even."""
        ratio = width / height
        if width >= height:
            width, height = longest, int(longest / ratio)
            height += height % 2
        else:
            height, width = longest, int(longest * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > LARGEST:
            width, height = LARGEST, int(LARGEST / ratio)
        elif height > width and height > LARGEST:
            height, width = LARGEST, int(LARGEST * ratio)
        return max(height, 1), max(width, 1)

    def _tiles(self, height: int, width: int, longest: int) -> Grid:
        if self.settings["do_resize"]:
            height, width = self._first_size(height, width, longest)
        ratio, tile = width / height, self._tile
        if width >= height:
            columns = ceil(width / tile)
            return Grid(ceil(int(columns * tile / ratio) / tile), columns)
        rows = ceil(height / tile)
        return Grid(rows, ceil(int(rows * tile * ratio) / tile))

    def _square(self, image: Array) -> Array:
        return self._scaled(image, self._tile, self._tile)

    def _scaled(self, image: Array, height: int, width: int) -> Array:
        return resized(image, height, width, self.settings["resample"])
