"""Qwen3-VL and Qwen2.5-VL: one picture with both sides a multiple of a merged patch."""

from __future__ import annotations

import math

from inflight.contract import Array, Detail, Grid
from inflight.errors import InvalidRequest
from inflight.vision.families.base import CLIP_MEAN, CLIP_STD, Family
from inflight.vision.families.pixels import Normal, resized
from inflight.vision.towers.base import Prepared

MAX_RATIO = 200
"""Longer side by shorter side; the processor refuses what is longer."""
LOW = 256
"""Tokens of an image of low detail."""


class QwenVl(Family):
    """The grid: rows and columns of merged patches, one token each; positions are on three axes."""

    types = ("qwen3_vl", "qwen2_5_vl")
    usual_token = "<|image_pad|>"
    defaults = {
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "do_resize": True,
        "patch_size": 14,
        "merge_size": 2,
    }

    def read(self) -> None:
        self._unit = int(self.settings["patch_size"]) * int(self.settings["merge_size"])
        size = self.settings["size"]
        named = {**size, **self.settings}  # files of several versions have the limits in several places
        self._least = int(named["min_pixels"] if "min_pixels" in named else named["shortest_edge"])
        self._most = int(named["max_pixels"] if "max_pixels" in named else named["longest_edge"])
        self._normal = Normal.of(self.settings)
        self.placeholder = f"<|vision_start|>{self.token}<|vision_end|>"

    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        height, width = self._sides(height, width, detail)
        return Grid(height // self._unit, width // self._unit)

    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        height, width = image.shape[:2]
        scaled = resized(image, *self._sides(height, width, detail), self.settings["resample"])
        return Prepared(self.grid(height, width, detail), self._normal(scaled)[None], (height, width))

    def text(self, grid: Grid) -> str:
        return f"<|vision_start|>{self.token * (grid.rows * grid.columns)}<|vision_end|>"

    def runs(self, grid: Grid) -> list[int]:
        return [grid.rows * grid.columns]

    def positions(self, grid: Grid) -> Grid | None:
        return grid

    def _sides(self, height: int, width: int, detail: Detail) -> tuple[int, int]:
        """Height and width as multiples of a merged patch, with a number of pixels within the limits, of about the
        same ratio.

        Raises:
            InvalidRequest: the image is too long for its width.
        """
        if max(height, width) > MAX_RATIO * min(height, width):
            raise InvalidRequest(f"invalid image: one side is more than {MAX_RATIO} times the other")
        unit = self._unit
        most = min(self._most, min(self.max_tokens, LOW if detail == "low" else self.max_tokens) * unit**2)
        least = min(self._least, most)
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > most:
            shrink = math.sqrt(height * width / most)
            rows = max(1, math.floor(height / shrink / unit))
            columns = max(1, math.floor(width / shrink / unit))
        elif rows * columns * unit**2 < least:
            grow = math.sqrt(least / (height * width))
            rows, columns = math.ceil(height * grow / unit), math.ceil(width * grow / unit)
        return rows * unit, columns * unit
