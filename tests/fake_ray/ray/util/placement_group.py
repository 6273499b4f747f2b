"""As in Ray: all bundles get a machine each, or none does."""

from __future__ import annotations

import time
from typing import Any

import ray


class PlacementGroup:
    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self._bundles = bundles
        self._removed = False

    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._take():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def _take(self) -> bool:
        with ray.lock:
            free = [each.name for each in ray.folder().iterdir() if each.name not in ray.used]
            if self._removed or len(free) < len(self._bundles):
                return False
            ray.used.update(dict.fromkeys(free[: len(self._bundles)], self))
            return True

    def remove(self) -> None:
        with ray.lock:
            self._removed = True
            for machine in [machine for machine, owner in ray.used.items() if owner is self]:
                del ray.used[machine]


def placement_group(bundles: list[dict[str, float]], strategy: str, name: str) -> Any:
    return PlacementGroup(bundles)
