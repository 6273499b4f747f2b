"""Families of vision models: how an image is written into a prompt, cut and scaled. Without torch; Pillow is imported
where pixels are scaled."""

from __future__ import annotations

import logging

from inflight.checkpoint import ModelFolder
from inflight.vision.families.base import Family, VisionFiles
from inflight.vision.families.gemma import Gemma3
from inflight.vision.families.gemma4 import Gemma4
from inflight.vision.families.internvl import InternVl
from inflight.vision.families.llava import Llava, LlavaNext, LlavaOnevision
from inflight.vision.families.pixtral import Pixtral
from inflight.vision.families.qwen import QwenVl
from inflight.vision.families.smolvlm import SmolVlm

log = logging.getLogger("inflight")

__all__ = ["FAMILIES", "Family", "VisionFiles", "open_family"]

_ALL: tuple[type[Family], ...] = (SmolVlm, QwenVl, Llava, LlavaNext, LlavaOnevision, InternVl, Gemma3, Gemma4, Pixtral)
FAMILIES: dict[str, type[Family]] = {name: family for family in _ALL for name in family.types}
"""By `model_type` in config.json."""


def open_family(folder: ModelFolder, max_tokens: int) -> Family | None:
    """The family of a model's images.

    Args:
        max_tokens: as in `Family`.

    Returns:
        None if the model reads text only, here or at all.

    Raises:
        StartError: its folder lacks a file.
    """
    config = folder.config
    kind = str(config.get("model_type"))
    if not isinstance(config.get("vision_config"), dict):
        return None
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        text = "'%s' reads text only: images of models of type '%s' are not read; those of %s are"
        log.warning(text, folder.name, kind, known)
        return None
    if kind == "llava" and config["vision_config"].get("model_type") == "pixtral":
        family = Pixtral
    return family(VisionFiles.of(folder), max_tokens)
