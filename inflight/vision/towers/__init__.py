"""Vision towers: from prepared pixels to rows in the language model's space."""

from inflight.vision.towers.base import Prepared, Tower, TowerOutput
from inflight.vision.towers.load import load_tower

__all__ = ["Prepared", "Tower", "TowerOutput", "load_tower"]
