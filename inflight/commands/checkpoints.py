"""Where a model and its adapters are: folders, or the hub."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from inflight.checkpoint import is_gguf
from inflight.config import AdapterConfig
from inflight.errors import ConfigError
from inflight.hub import HubModel, fetch, hint, locate


def adapters(text: str, cache: str | None = None) -> tuple[AdapterConfig, ...]:
    """`name=folder,org/name@revision`; what has no name is called like the folder, or by its id.

    Args:
        cache: where adapters of the hub are kept; None: in the hub's own cache.

    Raises:
        ConfigError: a folder that is not there, or a name twice.
    """
    found: list[AdapterConfig] = []
    for part in (each.strip() for each in text.split(",")):
        if not part:
            continue
        name, _, given = part.rpartition("=")
        adapter = AdapterConfig.of(name, given, cache=cache)
        if adapter.hub is None and not (adapter.folder / "adapter_config.json").is_file():
            known = adapter.folder.is_dir()
            raise ConfigError(
                f"'{given}' is no adapter: it holds no adapter_config.json"
                if known
                else f"'{given}' is no adapter: there is no such folder; {hint(given).replace('a model', 'an adapter')}"
            )
        found.append(replace(adapter, name=name or _called(adapter)))
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two adapters are named '{twice}'; write other=folder for one of them")
    return tuple(found)


def _called(adapter: AdapterConfig) -> str:
    """TGI's clients name an adapter of the hub by its id."""
    return adapter.folder.name if adapter.hub is None else adapter.hub.repo


def model_source(model_id: str, revision: str | None, cache: str | None) -> Path | HubModel:
    """What `--model-id` means: a path that exists (absolute), else a model of the hub.

    Raises:
        ConfigError: neither a path that exists, nor an id.
    """
    where = locate(model_id, revision=revision, cache=cache, bare=True)
    if isinstance(where, HubModel):
        return where
    if not where.exists():
        raise ConfigError(f"there is no '{model_id}' here; {hint(model_id)}")
    return where.absolute()


def find_model(model_id: str, revision: str | None, cache: str | None) -> Path:
    """The folder of a model, or its GGUF file; one of the hub is fetched, or found in its cache.

    Raises:
        ConfigError: as `model_source`.
        StartError: it cannot be fetched.
    """
    where = model_source(model_id, revision, cache)
    path = where if isinstance(where, Path) else asyncio.run(fetch(where)).path
    return path if is_gguf(path) else path.resolve()
