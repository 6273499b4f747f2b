"""Which version directories a servable has, and which one a start uses."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from inflight.contract import NEWEST
from inflight.errors import ConfigError, StartError
from inflight.servable.trace import CONFIG_FILE

_FIRST = 1
"""The version of a servable that has no version directory because it declares no model file."""


class Version(NamedTuple):
    """A version that can be started.

    Attributes:
        number: at least 1.
        path: its directory, or None where the servable has none (and needs none).
    """

    number: int
    path: Path | None


def check_config_location(directory: Path, name: str) -> Path:
    """Path of the servable's servable_config.py.

    Raises:
        ConfigError: the servable's folder or the file is missing.
    """
    folder = directory / name
    where = f"servable directory: '{directory}', servable name: '{name}'"
    if not folder.is_dir():
        raise ConfigError(f"Check servable config failed, directory '{folder}' not exist, {where}")
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"Check servable config failed, file '{config}' not exist, {where}")
    return config


def find_versions(directory: Path, name: str) -> list[int]:
    """Version numbers on disk, ascending: sub-directories named by digits only; 0 is none."""
    return sorted(_version_paths(directory / name))


def resolve_version(directory: Path, name: str, requested: int, has_models: bool) -> Version:
    """The version to start.

    Args:
        requested: its number, or 0 for the newest on disk.
        has_models: the servable declares model files, which lie in the version directory.

    Returns:
        Number and directory; the directory keeps its own spelling (`01`).

    Raises:
        StartError: there are model files to load and no directory to load them from.
    """
    paths = _version_paths(directory / name)
    where = f"servable directory: '{directory}', servable name: '{name}'"
    if has_models and not paths:  # whichever version is asked for
        raise StartError(
            "There is no valid version directory of models while there are models declared in servable_config.py, "
            f"{where}: put the model files into '{directory / name / str(requested or _FIRST)}'"
        )
    number = requested or max(paths, default=_FIRST)
    path = paths.get(number)
    if path is None and has_models:
        raise StartError(
            f"There is no specified version directory of models, specified version number: {number}, {where}, "
            f"versions there: {', '.join(map(str, sorted(paths))) or 'none'}"
        )
    return Version(number, path)


def _version_paths(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    paths: dict[int, Path] = {}
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if not (entry.name.isascii() and entry.name.isdigit() and entry.is_dir()):
            continue
        number = int(entry.name)
        # "1" is the plain spelling and wins over "01".
        if number != NEWEST and (number not in paths or entry.name == str(number)):
            paths[number] = entry
    return paths
