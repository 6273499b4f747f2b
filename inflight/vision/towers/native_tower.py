"""Towers on the CPU engine, without torch: of each family one module that lists its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inflight.checkpoint import Weights
from inflight.vision.towers.base import Tower
from inflight.vision.towers.native_gemma4 import Gemma4Tower
from inflight.vision.towers.native_internvl import InternVLTower
from inflight.vision.towers.native_llava import LlavaNextTower, LlavaOnevisionTower, llava_tower
from inflight.vision.towers.native_parts import NativeSettings, NotNative
from inflight.vision.towers.native_pixtral import PixtralTower
from inflight.vision.towers.native_qwen import Qwen3Tower, Qwen25Tower, Qwen35Tower
from inflight.vision.towers.native_siglip import Gemma3Tower, Idefics3Tower

Maker = Callable[[dict[str, Any], Weights, NativeSettings], Tower]

FAMILIES: dict[str, Maker] = {
    "gemma3": Gemma3Tower,
    "gemma4": Gemma4Tower,
    "idefics3": Idefics3Tower,
    "internvl": InternVLTower,
    "llava": llava_tower,
    "llava_next": LlavaNextTower,
    "llava_onevision": LlavaOnevisionTower,
    "mistral3": PixtralTower,
    "qwen2_5_vl": Qwen25Tower,
    "qwen3_5": Qwen35Tower,
    "qwen3_5_moe": Qwen35Tower,
    "qwen3_vl": Qwen3Tower,
    "smolvlm": Idefics3Tower,
}
"""By a config's `model_type`."""


def native_tower(config: dict[str, Any], weights: Weights, settings: NativeSettings) -> Tower | None:
    """The tower of a checkpoint on the CPU engine; None: of this family, or of this kind, there is none.

    Args:
        config: the checkpoint's `config.json`.
        weights: of the whole checkpoint, of which the tower's are read one after the other.

    Raises:
        StartError: the config or a weight does not fit the family; the text says which.
    """
    maker = FAMILIES.get(str(config.get("model_type")))
    if maker is None:
        return None
    try:
        return maker(config, weights, settings)
    except NotNative:
        return None
