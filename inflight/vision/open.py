"""Opens what reads a model's images."""

from __future__ import annotations

from inflight.config import GeneratorConfig, ServerConfig
from inflight.contract import Vision
from inflight.metrics import Metrics


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
        StartError: its images are of a kind that is not known here, or its folder cannot be read.
    """
    return None
