"""Opens what reads a model's images."""

from __future__ import annotations

import json
import logging
from hashlib import blake2b

from inflight.checkpoint import ModelFolder, open_model
from inflight.config import GeneratorConfig, ServerConfig
from inflight.contract import Vision
from inflight.metrics import Metrics
from inflight.vision.families import Family, open_family
from inflight.vision.fetch import Fetcher
from inflight.vision.process import VisionProcess
from inflight.vision.service import VisionService

log = logging.getLogger("inflight")


def open_vision(
    config: GeneratorConfig, server: ServerConfig = ServerConfig(), metrics: Metrics | None = None
) -> Vision | None:
    """What reads a model's images; it is still to be started.

    Args:
        config: the model, which lies on this machine.
        server: has the start timeout, the rule of restarts and the directory of logs.

    Returns:
        None if the model reads text only.

    Raises:
        StartError: its folder cannot be read.
    """
    encoder = encoder_of(config, server)
    if encoder is None:
        return None
    images = None if metrics is None else metrics.images
    return VisionService(encoder, config.vision, Fetcher(config.vision), images, config.name)


def encoder_of(config: GeneratorConfig, server: ServerConfig) -> VisionProcess | None:
    """What encodes a model's images, still to be started; None if it reads text only.

    Raises:
        StartError: as `open_vision`.
    """
    folder = open_model(config.model.model_dir, config.model.mmproj)
    if not isinstance(folder.config.get("vision_config"), dict):
        return None
    with folder.weights(allow_pickle=config.model.allow_pickle) as weights:
        if not any("vision" in name or "visual" in name for name in weights.names):
            log.info("'%s' holds the language model alone, so that it reads text only", folder.name)
            return None
    family = open_family(folder, config.vision.image_max_tokens)
    return None if family is None else VisionProcess(config, server, family, identity(folder, family))


def identity(folder: ModelFolder, family: Family) -> str:
    """Of the checkpoint and the settings of its images. Files of weights count by name, size and time: images that are
    kept are those of this process."""
    state = blake2b(digest_size=16)
    state.update(json.dumps([folder.config, family.settings, family.max_tokens], sort_keys=True, default=str).encode())
    for file in folder.weight_files():
        facts = file.stat()
        state.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
    return state.hexdigest()
