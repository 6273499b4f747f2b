"""Models on disk: which a folder holds, in which versions, and what each is started with."""

from inflight.repository.described import described
from inflight.repository.names import Names
from inflight.repository.policy import Snapshot, chosen, snapshot
from inflight.repository.room import Loaded, leaving
from inflight.repository.scan import (
    Found,
    ModelConfiguration,
    configurations,
    find_adapter,
    generator_config,
    inside,
    is_language_model,
    look,
    model_files,
    scan,
    servable_config,
)

__all__ = [
    "Found",
    "Loaded",
    "ModelConfiguration",
    "Names",
    "Snapshot",
    "chosen",
    "configurations",
    "described",
    "find_adapter",
    "generator_config",
    "inside",
    "is_language_model",
    "leaving",
    "look",
    "model_files",
    "scan",
    "servable_config",
    "snapshot",
]
