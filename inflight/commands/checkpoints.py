"""Where a model and its adapters are: folders, or the hub."""

from __future__ import annotations

import os
from pathlib import Path

from inflight.config import AdapterConfig
from inflight.errors import ConfigError
from inflight.gguf import is_gguf, model_folder
from inflight.telemetry import switch_off


def adapters(text: str) -> tuple[AdapterConfig, ...]:
    """`name=folder,folder`; a folder without a name is called like itself.

    Raises:
        ConfigError: a folder that is not there, or a name twice.
    """
    found: list[AdapterConfig] = []
    for part in (each.strip() for each in text.split(",")):
        if not part:
            continue
        name, equals, folder = part.rpartition("=")
        path = Path(folder).absolute()
        if not (path / "adapter_config.json").is_file():
            raise ConfigError(f"'{folder}' is no adapter: it holds no adapter_config.json")
        found.append(AdapterConfig(name if equals else path.name, path))
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two adapters are named '{twice}'; write other=folder for one of them")
    return tuple(found)


def find_model(model_id: str, revision: str | None, cache: str | None) -> Path:
    """The folder of a model, or its GGUF file; one of the hub is fetched, or found in its cache.

    Raises:
        ConfigError: neither is there.
    """
    folder = Path(model_id)
    if is_gguf(folder):
        return model_folder(folder)
    if folder.is_dir():
        return folder.absolute().resolve()
    switch_off()
    try:
        from huggingface_hub import snapshot_download  # comes with transformers
    except ImportError:
        raise ConfigError(f"'{model_id}' is no folder, and huggingface_hub is not installed to fetch it") from None
    try:
        found = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            token=os.environ.get("HF_TOKEN") or os.environ.get("HF_API_TOKEN"),
        )
    except Exception as error:  # the library raises a dozen kinds
        raise ConfigError(f"'{model_id}' is no folder and cannot be fetched from the hub: {error}") from error
    return Path(found)
