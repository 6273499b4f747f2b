"""Which models a folder holds, and the configuration of each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from inflight.checkpoint import is_adapter, is_gguf, open_model
from inflight.config import DescribedConfig, GeneratorConfig, Policy, ServableConfig, filled
from inflight.errors import ConfigError, StartError
from inflight.hub import HubModel
from inflight.repository.described import described
from inflight.runtime import SUFFIXES
from inflight.servable import CONFIG_FILE, find_versions
from inflight.startup import read_object

ModelConfiguration: TypeAlias = "ServableConfig | GeneratorConfig"
"""What a model is started with."""

_WEIGHTS = (".safetensors", ".gguf")
_OWN_FILES = ("tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that only the folder of a language model has."""
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_FILE = "model"
"""The stem of a version's file where its folder holds several, as in Triton's layout."""
_LATER_PART = re.compile(r"-(?!0*1-of-)\d+-of-\d+\.gguf$")


@dataclass(frozen=True)
class Found:
    """A model on disk.

    Attributes:
        name: that of its folder, or of its file without the ending.
        place: the servable's folder, the model file, or the language model's folder or file; of a model with numbered
            folders the folder that holds them.
        versions: by number, in ascending order, the folder or file of each. A servable without numbered folders has
            version 1, in its own folder.
        language: it is a language model.
        servable: it is a folder with servable_config.py.
        folder: where a description of the model may lie (config.pbtxt); None: nowhere.
    """

    name: str
    place: Path
    versions: Mapping[int, Path]
    language: bool = False
    servable: bool = False
    folder: Path | None = None

    @property
    def described(self) -> DescribedConfig | None:
        """What its folder says of it; None: nothing.

        Raises:
            ConfigError: it cannot be read.
        """
        return described(self.folder) if self.folder is not None else None


def is_language_model(path: Path) -> bool:
    """Whether a path is a checkpoint in Hugging Face layout, or a GGUF file.

    A folder with weights or a tokenizer is one whatever its config.json holds, and so is one with an unreadable
    config.json: the error is reported when the model is loaded.
    """
    if is_gguf(path):
        return not is_adapter(path)
    if not path.is_dir() or (path / CONFIG_FILE).is_file() or is_adapter(path):
        return False
    if any(file.name in _OWN_FILES or file.suffix in _WEIGHTS for file in path.iterdir()):
        return True
    config = path / "config.json"
    if not config.exists():
        return False
    try:
        return "model_type" in read_object(config)
    except StartError:
        return next(path.glob(f"*/{CONFIG_FILE}"), None) is None


def find_adapter(name: str, folders: Sequence[Path]) -> Path | None:
    """The adapter of this name in the first of these folders that holds one; None: there is none."""
    for folder in folders:
        try:
            children = sorted(folder.iterdir())
        except OSError:
            continue
        for child in children:  # a name is compared and never part of a path
            if name in (child.name, child.name.removesuffix(".gguf")) and is_adapter(child):
                return child
    return None


def look(path: Path) -> Found | None:
    """The model at a path: a servable, a model file, a language model, a folder with numbered versions of the last two,
    or a folder with one model file. None: it is none of these.

    Args:
        path: absolute.
    """
    if is_adapter(path):
        return None
    if path.is_file() and not is_gguf(path):
        return Found(path.stem, path, {1: path}) if path.suffix.lower() in SUFFIXES else None
    if (path / CONFIG_FILE).is_file():
        numbers = find_versions(path.parent, path.name) or [1]
        return Found(path.name, path, dict.fromkeys(numbers, path), servable=True)
    if is_language_model(path):
        name = open_model(path).name if path.is_file() else path.name  # of parts, the name without the number
        return Found(name, path, {1: path}, language=True)
    if not path.is_dir():
        return None
    versions = {int(child.name): child for child in path.iterdir() if _VERSION.fullmatch(child.name)}
    named = _named_file(path)
    held = {
        number: content for number in sorted(versions) if (content := _content(versions[number], named)) is not None
    }
    if held:
        return Found(path.name, path, held, language=is_language_model(held[max(held)]), folder=path)
    files = model_files(path)
    return Found(path.name, path, {1: files[0]}, folder=path) if len(files) == 1 else None


def model_files(folder: Path) -> list[Path]:
    """The files of classic models in a folder. One alone is a model with the name of the folder, as KServe has them."""
    return sorted(child for child in folder.iterdir() if child.suffix.lower() in SUFFIXES)


def _named_file(folder: Path) -> str:
    """The file of each version that a description names; empty: none. A broken description is told by a load."""
    try:
        says = described(folder)
    except ConfigError:
        return ""
    return says.file if says is not None else ""


def _content(folder: Path, named: str = "") -> Path | None:
    """What a version's folder holds: itself where it is a language model, else its model file."""
    if not folder.is_dir():
        return None
    if named and Path(named).name == named and (folder / named).is_file():
        return folder / named
    if is_language_model(folder) and not any(is_gguf(file) for file in folder.iterdir()):
        return folder
    files = sorted(
        child
        for child in folder.iterdir()
        if (child.suffix.lower() in SUFFIXES or is_gguf(child)) and not _LATER_PART.search(child.name)
    )
    first = [file for file in files if file.stem == _FILE]
    return next(iter(first or files), None)


def scan(folder: Path) -> dict[str, Found]:
    """The models of a repository by name, in the order of their names. Hidden files are passed over, and so is what
    cannot be read.

    Args:
        folder: absolute.
    """
    found: dict[str, Found] = {}
    try:
        children = sorted(folder.iterdir())
    except OSError:
        return found
    for child in children:
        if child.name.startswith(".") or _LATER_PART.search(child.name):
            continue
        try:
            model = look(child)
        except (OSError, StartError):  # as a file that is still being written
            continue
        if model is not None:
            found.setdefault(model.name, model)
    return found


def inside(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path, with its links followed, lies in one of these folders."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def configurations(
    found: Found, versions: Sequence[int], values: Mapping[str, Any], **fields: Any
) -> list[ModelConfiguration]:
    """The configuration of each of a model's versions.

    Args:
        values: the options of `inflight serve` by key; what is missing has its default.
        fields: fields of the configurations; they override `values`. `name` is the name for clients.
    """
    return [_configuration(found, version, values, **fields) for version in versions]


def _configuration(found: Found, version: int, values: Mapping[str, Any], **fields: Any) -> ModelConfiguration:
    name: str = fields.pop("name", None) or found.name
    place = found.versions[version]
    if found.language:
        return generator_config(place, str(place), values, name=name, version=version, **fields)
    if found.servable:
        if name != found.name:  # another name would be the path of another folder
            raise ConfigError(f"a servable has the name of its folder; load '{found.name}' by that name")
        return servable_config(place.parent, name, None, values, version=version, **fields)
    return servable_config(place.parent, name, place, values, version=version, **_by(found.described, values), **fields)


def _by(says: DescribedConfig | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that a description sets."""
    if says is None:
        return {}
    told: dict[str, Any] = {"described": says}
    if says.max_batch_size:
        told["max_batch_size"] = says.max_batch_size
    if says.instances > 1:
        devices = values.get("device_ids", (0,))
        if devices:  # these, in turn: a machine need not have more
            told["device_ids"] = tuple(devices[number % len(devices)] for number in range(says.instances))
        else:
            told["num_parallel_workers"] = says.instances
    return told


def servable_config(
    directory: Path, name: str, file: Path | None, values: Mapping[str, Any], **fields: Any
) -> ServableConfig:
    """The configuration of a servable, or of a model file.

    Args:
        file: the model file; None for a servable, whose folder is `directory / name`.
        values: the options of `inflight serve` by key; what is missing has its default.
        fields: fields of the configuration; they override `values`.
    """
    devices = fields.get("device_ids", values.get("device_ids", (0,)))
    fields.setdefault("num_parallel_workers", values.get("workers") or int(not devices))
    fields.setdefault("resources", values.get("cluster_resources", ()))
    return filled(ServableConfig, values, **{"directory": directory, "name": name, "model_file": file, **fields})


def generator_config(
    where: Path | HubModel, written: str, values: Mapping[str, Any], name: str = "", **fields: Any
) -> GeneratorConfig:
    """The configuration of one language model from the options.

    Args:
        where: its folder, its GGUF file, or the model of the hub to fetch.
        written: the path or id as the user wrote it.
        values: the options of `inflight serve` by key; what is missing has its default.
        name: for clients; empty: that of the folder or file.
        fields: fields of the configuration; they override `values`.
    """
    if isinstance(where, HubModel):
        hub, folder, own, known = where, Path(where.repo), where.name, written
    else:
        # The target of a link to a GGUF file may have a meaningless name; `.` has no name.
        folder = where.absolute() if is_gguf(where) else where.resolve()
        hub, known = None, str(folder)
        own = open_model(folder).name if is_gguf(folder) else folder.name  # without the number of a part
    given: tuple[int, ...] = values.get("device_ids", ())
    size, replicas = values.get("tensor_parallel", 1), values.get("max_replicas") or values.get("replicas", 1)
    if replicas == 1 and given and len(given) % size == 0:
        replicas = len(given) // size
    told = {
        "model_id": values.get("model_id") or known,
        "device_type": values.get("device_type"),
        "replicas": replicas,
        "device_ids": given if len(given) == size * replicas else (),
        "max_batch_size": values.get("max_batch_size") or Policy().max_batch_size,
    }
    return GeneratorConfig.asked(hub or folder, name or own, values, **{**told, **fields})
