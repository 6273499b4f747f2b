"""Qwen3-VL, Qwen3.5 and Qwen2.5-VL: one picture with both sides a multiple of a merged patch."""

from __future__ import annotations

import math

from inflight.contract import Grid
from inflight.vision.families.base import CLIP
from inflight.vision.families.patches import Patches
from inflight.vision.families.pixels import Normal
from inflight.vision.limits import check_ratio


class QwenVl(Patches):
    """The grid: rows and columns of merged patches, one token each; positions are on three axes."""

    types = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
    usual_token = "<|image_pad|>"
    defaults = {
        **CLIP,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "do_resize": True,
        "patch_size": 14,
        "merge_size": 2,
    }

    def read(self) -> None:
        self.unit = int(self.settings["patch_size"]) * int(self.settings["merge_size"])
        size = self.settings["size"]
        named = {**size, **self.settings}  # files of several versions have the limits in several places
        self._least = int(named["min_pixels"] if "min_pixels" in named else named["shortest_edge"])
        self._largest = int(named["max_pixels"] if "max_pixels" in named else named["longest_edge"])
        self.normal = Normal.of(self.settings)
        self.placeholder = f"<|vision_start|>{self.token}<|vision_end|>"

    def text(self, grid: Grid) -> str:
        return f"<|vision_start|>{self.token * (grid.rows * grid.columns)}<|vision_end|>"

    def runs(self, grid: Grid) -> list[int]:
        return [grid.rows * grid.columns]

    def positions(self, grid: Grid) -> Grid | None:
        return grid

    def sides(self, height: int, width: int, most: int) -> tuple[int, int]:
        """The number of pixels is within the processor's limits and `most`, the ratio about the same.

        Raises:
            InvalidRequest: the image is too long for its width.
        """
        check_ratio(height, width)
        unit = self.unit
        most = min(self._largest, most * unit**2)
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
