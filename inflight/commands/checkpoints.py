"""Finds a model: in a folder, in a GGUF file, or on the hub."""

from __future__ import annotations

import asyncio
from pathlib import Path

from inflight.checkpoint import is_gguf
from inflight.errors import ConfigError
from inflight.hub import HubModel, fetch, hint, locate


def model_source(model_id: str, revision: str | None, cache: str | None) -> Path | HubModel:
    """The model that `--model-id` names: an existing path (made absolute), else a model of the hub.

    Raises:
        ConfigError: it is neither an existing path nor an id.
    """
    where = locate(model_id, revision=revision, cache=cache, bare=True)
    if isinstance(where, HubModel):
        return where
    if not where.exists():
        raise ConfigError(f"there is no '{model_id}' here; {hint(model_id)}")
    return where.absolute()


def find_model(model_id: str, revision: str | None, cache: str | None) -> Path:
    """The folder of a model, or its GGUF file; a model of the hub is fetched, or found in the cache.

    Raises:
        ConfigError: as in `model_source`.
        StartError: the model cannot be fetched.
    """
    where = model_source(model_id, revision, cache)
    path = where if isinstance(where, Path) else asyncio.run(fetch(where)).path
    return path if is_gguf(path) else path.resolve()
