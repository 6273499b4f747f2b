"""One interface to five layouts of models on disk (`open_model`), which reads each file once."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from inflight.checkpoint.experts import StackedExperts
from inflight.checkpoint.files import INDEX, SINGLE, TensorFiles, Tensors
from inflight.checkpoint.gguf import (
    Companion,
    GgufParts,
    GgufWeights,
    JoinedWeights,
    companion_of,
    companions_in,
    generation_config,
    hf_config,
    is_gguf,
    stem_of,
)
from inflight.checkpoint.methods import scheme_of
from inflight.checkpoint.pickled import PickledFiles, has_pickles, refusal
from inflight.checkpoint.quantised_files import QuantisedFiles
from inflight.checkpoint.sentences import SentenceModel, read_sentence_model
from inflight.checkpoint.source import Progress, Weights
from inflight.errors import StartError
from inflight.startup import read_object, read_text

log = logging.getLogger("inflight")

Json = Mapping[str, Any]
Told = Callable[[float], None]

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
IMAGE_PROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MODULES, ADAPTER = "modules.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Templates:
    """Chat templates.

    Attributes:
        own: from the model's own template files; they take precedence over `configured`.
        configured: `chat_template` of tokenizer_config.json: a text, or several by name in a list or an object, not
            checked here.
    """

    own: Mapping[str, str]
    configured: Any


class ModelFolder(ABC):
    """A model on disk, opened by `open_model`. Each file is read on demand, once.

    Attributes:
        path: the folder, or the file.
        kind: the layout.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The model's default name in a server."""
        return self.path.resolve().name

    @property
    @abstractmethod
    def config(self) -> Json:
        """config.json, or its equivalent made from metadata.

        Raises:
            StartError: it is missing or cannot be read; the text says what is wrong.
        """

    @property
    @abstractmethod
    def generation_config(self) -> Json:
        """generation_config.json, or its equivalent made from metadata; empty if there is none."""

    @abstractmethod
    def weights(self, progress: Told | None = None, allow_pickle: bool = False) -> Weights:
        """The named weights, for a `with` statement.

        Args:
            progress: called with the share of the bytes that were read so far.
            allow_pickle: read pytorch_model.bin if there are no safetensors.

        Raises:
            StartError: no weights, an unreadable file or an unknown quantisation; the text names it.
        """

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that determine the weights and their meaning, for a cache's key."""

    @property
    def beside(self) -> Path:
        """The folder with the model's tokenizer files."""
        return self.path

    @property
    def metadata(self) -> Json | None:
        """A GGUF file's metadata by its keys, with the vocabulary; None for the others."""
        return None

    @cached_property
    def image_processor(self) -> Json | None:
        """The settings of the image processor: preprocessor_config.json, or what a newer processor_config.json has in
        place of it; None if there is neither.

        Raises:
            StartError: a file cannot be read.
        """
        nested = _optional(self.beside / PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return nested
        path = self.beside / IMAGE_PROCESSOR
        return read_object(path) if path.exists() else None

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json; None if there is none."""
        path = self.beside / TOKENIZER
        return path if path.is_file() else None

    @cached_property
    def tokenizer_config(self) -> Json:
        """tokenizer_config.json merged over special_tokens_map.json; empty if there is neither."""
        return {**_optional(self.beside / SPECIAL_TOKENS), **_optional(self.beside / TOKENIZER_CONFIG)}

    @cached_property
    def templates(self) -> Templates:
        """chat_template.jinja with additional_chat_templates/NAME.jinja, and tokenizer_config.json's.

        Raises:
            StartError: a file cannot be read.
        """
        own: dict[str, str] = {}
        if (self.beside / TEMPLATE).exists():
            own["default"] = read_text(self.beside / TEMPLATE)
        if (self.beside / TEMPLATES).is_dir():
            for path in sorted((self.beside / TEMPLATES).glob("*.jinja")):
                own[path.stem] = read_text(path)
        return Templates(own, self.tokenizer_config.get("chat_template"))

    @cached_property
    def sentences(self) -> SentenceModel | None:
        """The description of vectors in a sentence-transformers folder; None for other layouts.

        Raises:
            StartError: as `read_sentence_model`.
        """
        return read_sentence_model(self.path)


class HfFolder(ModelFolder):
    """A folder in Hugging Face layout."""

    kind = "folder"

    @property
    def inner(self) -> Path:
        """The folder with config and weights."""
        return self.path

    @cached_property
    def config(self) -> Json:
        if not (self.inner / CONFIG).is_file():
            raise StartError(f"'{self.inner}' has no config.json; give a folder in Hugging Face layout, or a GGUF file")
        return read_object(self.inner / CONFIG)

    @cached_property
    def generation_config(self) -> Json:
        return _optional(self.inner / GENERATION)

    def weights(self, progress: Told | None = None, allow_pickle: bool = False) -> Weights:
        config = self.config if (self.inner / CONFIG).is_file() else {}
        scheme = scheme_of(config)  # first, because an unknown method explains all other errors in the files
        tell = Progress(progress)
        files = self._files(tell, allow_pickle)
        tell.total = files.size
        source = QuantisedFiles(files, scheme)
        return Weights(StackedExperts(files, source) if config.get("model_type") == "gpt_oss" else source)

    def weight_files(self) -> list[Path]:
        kept = (".safetensors", ".json", ".bin")
        return [file for file in sorted(self.inner.iterdir()) if file.suffix in kept and file.is_file()]

    def _files(self, tell: Progress, allow_pickle: bool) -> Tensors:
        if any((self.inner / name).is_file() for name in (INDEX, SINGLE)) or not has_pickles(self.inner):
            return TensorFiles(self.inner, tell)
        if not allow_pickle:
            raise refusal(self.inner)
        return PickledFiles(self.inner)


class SentenceFolder(HfFolder):
    """A folder of sentence-transformers: modules.json lists the modules that a text passes in order."""

    kind = "sentence-transformers"

    @cached_property
    def modules(self) -> list[tuple[str, Path]]:
        """The type of each module, by its last name (`Transformer`, `Pooling`, `Dense`, `Normalize`), and its folder.

        Raises:
            StartError: modules.json is invalid.
        """
        return _modules(self.path)

    @property
    def inner(self) -> Path:
        return next((folder for kind, folder in self.modules if kind == "Transformer"), self.path)

    @property
    def beside(self) -> Path:
        inner = self.inner
        return inner if (inner / TOKENIZER).is_file() else self.path


class LoraFolder(HfFolder):
    """An adapter in PEFT's layout; its config is adapter_config.json."""

    kind = "adapter"

    @cached_property
    def config(self) -> Json:
        return read_object(self.path / ADAPTER)

    def weights(self, progress: Told | None = None, allow_pickle: bool = False) -> Weights:
        tell = Progress(progress)
        files = TensorFiles(self.path, tell, ADAPTER_WEIGHTS)
        tell.total = files.size
        return Weights(QuantisedFiles(files, None))

    def weight_files(self) -> list[Path]:
        return [self.path / name for name in (ADAPTER, ADAPTER_WEIGHTS)]


class GgufModel(ModelFolder):
    """A GGUF file, or the first of several parts, with the file of its vision part (`mmproj`) if one is beside it.

    Args:
        mmproj: the file of its vision part; None: one that is beside it.
    """

    kind = "gguf"

    def __init__(self, path: Path, mmproj: Path | None = None) -> None:
        super().__init__(path)
        self._mmproj = mmproj

    @property
    def name(self) -> str:
        return stem_of(self.path)

    @property
    def beside(self) -> Path:
        return self.path.parent

    @cached_property
    def config(self) -> Json:
        return hf_config(self._parts) if self._companion is None else self._companion.config

    @cached_property
    def image_processor(self) -> Json | None:
        """As in other layouts if there is a file of it; the vision part has its settings in metadata."""
        return super().image_processor or (None if self._companion is None else self._companion.processor)

    @cached_property
    def generation_config(self) -> Json:
        return generation_config(self._parts)

    @property
    def metadata(self) -> Json:
        return self._parts.metadata

    @cached_property
    def tokenizer_config(self) -> Json:
        """As in other layouts if there is a tokenizer.json; the file's own vocabulary has its settings in metadata."""
        return super().tokenizer_config if self.tokenizer_file is not None else {}

    @cached_property
    def templates(self) -> Templates:
        return super().templates if self.tokenizer_file is not None else Templates(_own_templates(self.metadata), None)

    def weights(self, progress: Told | None = None, allow_pickle: bool = False) -> Weights:
        tell = Progress(progress)
        text, vision = GgufWeights(self._parts, tell), self._companion
        source = text if vision is None else JoinedWeights(text, vision.weights(tell))
        tell.total = source.size
        return Weights(source)

    def weight_files(self) -> list[Path]:
        return self._parts.paths + ([] if self._companion is None else self._companion.file.paths)

    @cached_property
    def _parts(self) -> GgufParts:
        return GgufParts(self.path)

    @cached_property
    def _companion(self) -> Companion | None:
        """The vision part. One that nobody named and that cannot be used is no reason not to serve texts: folders hold
        files of several models."""
        if self._mmproj is not None:
            return Companion(self._mmproj, self._parts, hf_config(self._parts))
        try:
            path = companion_of(self.path)
            return None if path is None else Companion(path, self._parts, hf_config(self._parts))
        except StartError as error:
            log.warning("'%s' reads text only: %s", self.name, error)
            return None


def open_model(path: Path | str, mmproj: Path | None = None) -> ModelFolder:
    """Opens the model at a path: a folder in Hugging Face layout, one of sentence-transformers, an adapter, a GGUF
    file or one of its parts, or a folder with one GGUF model, its vision part if it has one, and no other weights.

    Args:
        mmproj: the file with the vision part of a GGUF model; None: one that is beside it.

    Raises:
        StartError: the path holds none of these, or no GGUF model and `mmproj` is given.
    """
    path = Path(path)
    if is_gguf(path):
        return GgufModel(path, mmproj)
    if not path.is_dir():
        found = "is no folder" if not path.exists() else "is no GGUF file"
        raise StartError(f"'{path}' {found}; give a folder in Hugging Face layout, or a GGUF file")
    files = [] if _has_tensors(path) else [file for file in sorted(path.glob("*.gguf")) if is_gguf(file)]
    if files:
        return _only_gguf(path, files, mmproj)
    if mmproj is not None:
        raise StartError(f"mmproj is the vision part of a GGUF model, and '{path}' is none; leave the setting out")
    if (path / MODULES).is_file():
        return SentenceFolder(path)
    return LoraFolder(path) if (path / ADAPTER).is_file() and not (path / CONFIG).is_file() else HfFolder(path)


def _has_tensors(folder: Path) -> bool:
    return next(folder.glob("*.safetensors"), None) is not None or has_pickles(folder)


def _only_gguf(folder: Path, files: list[Path], mmproj: Path | None) -> GgufModel:
    aside = companions_in(folder)
    models = {stem_of(file): file for file in reversed(files) if file not in aside}  # of several parts the first one
    models = models or {stem_of(file): file for file in files}
    if len(models) > 1:
        names = ", ".join(sorted(models))
        raise StartError(f"'{folder}' holds several GGUF models ({names}); give the path of one file")
    return GgufModel(next(iter(models.values())), mmproj)


def _optional(path: Path) -> Json:
    return read_object(path) if path.exists() else {}


def _own_templates(metadata: Json) -> Mapping[str, str]:
    """`tokenizer.chat_template` and, for each name in `tokenizer.chat_templates`, `tokenizer.chat_template.NAME`."""
    found = {"default": metadata.get("tokenizer.chat_template")}
    names = metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else []:
        found[str(name)] = metadata.get(f"tokenizer.chat_template.{name}")
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _modules(folder: Path) -> list[tuple[str, Path]]:
    import json

    path = folder / MODULES
    try:
        entries = json.loads(read_text(path))
        found = [(str(each["type"]).rpartition(".")[2], folder / str(each["path"])) for each in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StartError(f"'{path}' must be a list of modules with type and path ({error!r}); download it") from error
    for _, each in found:
        if not each.resolve().is_relative_to(folder.resolve()):
            raise StartError(f"'{path}' names the folder '{each}', which lies outside of the model's")
    return found
