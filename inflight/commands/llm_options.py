"""Options of `inflight serve` for language models: TGI's names where TGI has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inflight.checkpoint import is_gguf, open_model
from inflight.commands.options import Option
from inflight.config import SETTINGS, GeneratorConfig, Policy
from inflight.errors import StartError
from inflight.hub import HubModel
from inflight.startup import read_object

_WEIGHTS = (".safetensors", ".gguf")
_OWN_FILES = ("tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that only the folder of a language model has."""


LLM_OPTIONS = (
    Option(
        "revision",
        str,
        "Branch, tag or commit of a model of the hub. Default: its main branch.",
        metavar="REVISION",
        of_model=True,
    ),
    *(Option.of(each, of_model=True) for each in SETTINGS),
)


def is_language_model(path: Path) -> bool:
    """Whether a path is a checkpoint in Hugging Face layout, or a GGUF file.

    A folder with weights or a tokenizer is one whatever its config.json holds, and so is one with an unreadable
    config.json: the error is reported when the model is loaded.
    """
    if is_gguf(path):
        return True
    if not path.is_dir() or (path / "servable_config.py").is_file():
        return False
    if any(file.name in _OWN_FILES or file.suffix in _WEIGHTS for file in path.iterdir()):
        return True
    config = path / "config.json"
    if not config.exists():
        return False
    try:
        return "model_type" in read_object(config)
    except StartError:
        return next(path.glob("*/servable_config.py"), None) is None


def generator_config(where: Path | HubModel, written: str, values: Mapping[str, Any]) -> GeneratorConfig:
    """The configuration of one language model from the options.

    Args:
        where: its folder, its GGUF file, or the model of the hub to fetch.
        written: the path or id as the user wrote it.
    """
    if isinstance(where, HubModel):
        hub, folder, name, known = where, Path(where.repo), where.name, written
    else:
        # The target of a link to a GGUF file may have a meaningless name; `.` has no name.
        folder = where.absolute() if is_gguf(where) else where.resolve()
        hub, known = None, str(folder)
        name = open_model(folder).name if is_gguf(folder) else folder.name  # without the number of a part
    given: tuple[int, ...] = values["device_ids"]
    size, replicas = values["tensor_parallel"], values["replicas"]
    if replicas == 1 and given and len(given) % size == 0:
        replicas = len(given) // size
    return GeneratorConfig.asked(
        hub or folder,
        values["name"] or name,
        values,
        model_id=values["model_id"] or known,
        device_type=values["device_type"],
        replicas=replicas,
        device_ids=given if len(given) == size * replicas else (),
        max_batch_size=values["max_batch_size"] or Policy().max_batch_size,
    )
