"""Gemma 4: one picture of about as many tokens as it may have, with both sides a multiple of a token's."""

from __future__ import annotations

import math

from inflight.contract import Detail, Grid
from inflight.vision.families.patches import Patches
from inflight.vision.families.pixels import Normal

BUDGETS = (70, 140, 280, 560, 1120)
"""Tokens of an image at most, one of which the image processor's settings choose: the model knows these."""


class Gemma4(Patches):
    """The grid: rows and columns of tokens. In the larger models the tokens of an image see each other where attention
    has a window. A picture is scaled up as well as down."""

    types = ("gemma4",)
    usual_token = "<|image|>"
    usual_hidden = 2304
    defaults = {
        "resample": 3,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "max_soft_tokens": 280,
    }

    def read(self) -> None:
        text = self.config["text_config"]
        self.unit = int(self.settings["patch_size"]) * int(self.settings["pooling_kernel_size"])
        self._largest = int(self.settings["max_soft_tokens"])
        self.normal = Normal.of(self.settings)
        self.whole = text.get("use_bidirectional_attention") == "vision"
        self.filler_id = int(text.get("pad_token_id") or 0)
        self._begin, self._end = (
            self._marker(name, usual) for name, usual in (("boi", "<|image>"), ("eoi", "<image|>"))
        )

    @property
    def together(self) -> int:
        return self._most("auto") if self.whole else 0

    def _marker(self, name: str, usual: str) -> str:
        return self.tokens.get(int(self.config.get(f"{name}_token_id") or -1), usual)

    def text(self, grid: Grid) -> str:
        return f"{self._begin}{self.token * (grid.rows * grid.columns)}{self._end}"

    def runs(self, grid: Grid) -> list[int]:
        return [grid.rows * grid.columns]

    def _most(self, detail: Detail) -> int:
        """The largest of the known numbers that is allowed, if one is."""
        most = min(self.max_tokens, self._largest, BUDGETS[0] if detail == "low" else self._largest)
        return max((each for each in BUDGETS if each <= most), default=most)

    def sides(self, height: int, width: int, most: int) -> tuple[int, int]:
        """The ratio is about the same, and the number of tokens next below `most`."""
        unit = self.unit
        factor = math.sqrt(most * unit**2 / (height * width))
        rows, columns = (math.floor(factor * side / unit) for side in (height, width))
        if rows == 0:
            rows, columns = 1, min(width // height, most)
        elif columns == 0:
            rows, columns = min(height // width, most), 1
        return rows * unit, columns * unit
