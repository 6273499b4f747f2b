"""LLaVA 1.5, NeXT and OneVision: a square picture; the later ones with tiles of it, which are joined and cut to the
picture's form."""

from __future__ import annotations

import math

import numpy as np

from inflight.contract import Array, Detail, Grid
from inflight.errors import StartError
from inflight.vision.families.base import CLIP, Family
from inflight.vision.families.pixels import Normal, resized, tiles_of
from inflight.vision.towers.base import Prepared

BASE = Grid(0, 0)
"""The grid of an image without tiles."""


class Llava(Family):
    """LLaVA 1.5. The grid is always (0, 0)."""

    types = ("llava",)
    usual_token = "<image>"
    defaults = {
        **CLIP,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_pad": False,
        "do_center_crop": True,
    }
    strategy = "default"

    def read(self) -> None:
        self._resample = self.settings["resample"]
        self._normal = Normal.of(self.settings)
        size = self.settings["size"]
        self._side = int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
        if self._side != int(self.vision["image_size"]):
            raise StartError(
                f"preprocessor_config.json makes pictures of {self._side} pixels, and the tower in config.json takes "
                f"{self.vision['image_size']}; both must be the same"
            )
        self._patches = self._side // int(self.vision["patch_size"])
        full = self.config.get("vision_feature_select_strategy", self.strategy) == "full"
        clip = self.vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        self._base = self._patches**2 + int(full and clip)  # CLIP's token of the whole picture counts

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        return BASE

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        if self.settings["do_pad"]:
            image = self._squared(image)
        if "shortest_edge" in self.settings["size"]:
            image = self._scaled_to_shortest(image)
        else:
            image = self._square(image)
        if self.settings["do_center_crop"]:
            image = self._cropped(image)
        return Prepared(BASE, self._normal(image)[None], (height, width))

    def text(self, grid: Grid) -> str:
        return self.token * self.runs(grid)[0]

    def runs(self, grid: Grid) -> list[int]:
        return [self._base]

    def _square(self, image: Array) -> Array:
        return resized(image, self._side, self._side, self._resample)

    def _squared(self, image: Array) -> Array:
        """The picture in the middle of a square of the mean colour."""
        height, width = image.shape[:2]
        side = max(height, width)
        mean = np.broadcast_to(np.asarray(self.settings["image_mean"], np.float64), (3,))
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(value * 255) for value in mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image
        return square

    def _scaled_to_shortest(self, image: Array) -> Array:
        height, width = image.shape[:2]
        short, long = self._side, int(self._side * max(height, width) / min(height, width))
        height, width = (long, short) if width <= height else (short, long)
        return resized(image, height, width, self._resample)

    def _cropped(self, image: Array) -> Array:
        side = int(self.settings["crop_size"]["height"])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        return image[top : top + side, left : left + side]


class LlavaNext(Llava):
    """The grid: rows and columns of the joined tiles' tokens, without the padding; (0, 0): no tiles. Each row ends with
    a token of its own, and so does an image without tiles."""

    types = ("llava_next",)

    def read(self) -> None:
        super().read()
        self._sizes = [(int(height), int(width)) for height, width in self.settings["image_grid_pinpoints"]]

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        if detail == "low" or (not alone and self.alone_matters):
            return BASE
        grid = self._joined(height, width)
        return grid if sum(self.runs(grid)) <= self.max_tokens else BASE

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        grid = self.grid(height, width, detail, alone)
        tiles = [self._square(self._squared(image) if self.alone_matters and not alone else image)]
        if grid != BASE:
            tiles += tiles_of(self._fitted(image), self._side)
        return Prepared(grid, np.stack([self._normal(tile) for tile in tiles]), (height, width))

    def runs(self, grid: Grid) -> list[int]:
        return [self._base + (1 if grid == BASE else grid.rows * (grid.columns + 1))]

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """The size that keeps most of the picture's pixels, and of those the one with the least padding."""

        def kept(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / width, size[0] / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - size[0] * size[1]

        return max(self._sizes, key=kept)

    def _fitted(self, image: Array) -> Array:
        """The picture as large as it fits, in the middle of black."""
        height, width = image.shape[:2]
        most_height, most_width = self._best(height, width)
        across, down = most_width / width, most_height / height
        if across < down:
            size = min(math.ceil(height * across), most_height), most_width
        else:
            size = most_height, min(math.ceil(width * down), most_width)
        canvas = np.zeros((most_height, most_width, 3), np.uint8)
        top, left = (most_height - size[0]) // 2, (most_width - size[1]) // 2
        canvas[top : top + size[0], left : left + size[1]] = resized(image, *size, self._resample)
        return canvas

    def _joined(self, height: int, width: int) -> Grid:
        """The grid of the tiles' tokens without those that see nothing but padding."""
        rows, columns = (side // self._side * self._patches for side in self._best(height, width))
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return Grid(rows, columns)


class LlavaOnevision(LlavaNext):
    """Large grids are scaled down; of several images of a prompt each has no tiles."""

    types = ("llava_onevision",)
    usual_hidden = 896
    alone_matters = True
    strategy = "full"
    defaults = {
        **Llava.defaults,
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)],
    }

    def read(self) -> None:
        super().read()
        self._most = int(str(self.config.get("vision_aspect_ratio", "anyres_max_9")).rpartition("_")[2])

    def _joined(self, height: int, width: int) -> Grid:
        grid = super()._joined(height, width)
        ratio = math.sqrt(grid.rows * grid.columns / (self._most * self._patches**2))
        return Grid(int(grid.rows // ratio), int(grid.columns // ratio)) if ratio > 1.1 else grid
