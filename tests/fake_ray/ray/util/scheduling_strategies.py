"""As in Ray."""

from __future__ import annotations

from typing import Any


class PlacementGroupSchedulingStrategy:
    def __init__(self, group: Any, index: int) -> None:
        pass
