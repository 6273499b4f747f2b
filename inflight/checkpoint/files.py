"""Reads tensors from a folder's weight files."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from inflight.checkpoint.tensor_file import Entry, TensorFile
from inflight.errors import StartError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

Tensor = np.ndarray[Any, Any]


class Slice(NamedTuple):
    """Indices [first, end) of one dimension of a tensor: a rank's share of it."""

    dim: int
    first: int
    end: int


def sliced(tensor: Tensor, part: Slice | None) -> Tensor:
    """A view of a slice of a tensor; None: of all of it."""
    if part is None:
        return tensor
    index = [slice(None)] * tensor.ndim
    index[part.dim] = slice(part.first, part.end)
    view: Tensor = tensor[tuple(index)]
    return view


class Tensors(ABC):
    """Tensors by their stored names, read on demand.

    Attributes:
        names: all of them.
        size: bytes on disk.
    """

    names: list[str]
    size: int

    @abstractmethod
    def __contains__(self, name: str) -> bool: ...

    @abstractmethod
    def whole(self, name: str) -> Tensor:
        """A view of a tensor in the file, in the file's dtype.

        Raises:
            StartError: it is missing, or its dtype is unknown.
        """

    @abstractmethod
    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it.

        Raises:
            StartError: it is missing.
        """

    @abstractmethod
    def file_of(self, name: str) -> str:
        """The name of the file that a tensor is in."""

    @abstractmethod
    def release(self) -> None:
        """Releases the memory of the tensors that were read."""

    def check(self, name: str, wanted: Sequence[int]) -> None:
        """Raises StartError if the tensor is missing or has another shape."""
        found = self.shape(name)
        if found != list(wanted):
            raise StartError(
                f"tensor '{name}' in '{self.file_of(name)}' has shape {found}, the config wants {list(wanted)}; are "
                "config.json and the weights of one model?"
            )

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Tensor:
        """A view of a tensor in the file, or of a slice of it.

        Args:
            shape: of the whole tensor.

        Raises:
            StartError: it is missing or of another shape; the text names tensor and file.
        """
        self.check(name, shape)
        return sliced(self.whole(name), part)


class TensorFiles(Tensors):
    """One safetensors file, or several with or without their index.

    Args:
        tell: called with the bytes of each tensor that was read.
        single: the name of the one file.

    Raises:
        StartError: no weights, or a file that cannot be read; the text names it.
    """

    def __init__(self, folder: Path, tell: Callable[[int], None], single: str = SINGLE) -> None:
        self._folder = folder
        self._tell = tell
        self._open: dict[Path, TensorFile] = {}
        self._read: list[tuple[TensorFile, int, int]] = []
        self._files = self._find(single)
        self.names = list(self._files)
        self.size = sum(file.stat().st_size for file in dict.fromkeys(self._files.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> list[int]:
        return list(self._entry(name)[1].shape)

    def whole(self, name: str) -> Tensor:
        file, entry = self._entry(name)
        file.file.expect(entry.start, entry.size)
        self._tell(entry.size)
        self._read.append((file, entry.start, entry.size))
        return file.array(name)

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Tensor:
        """As the base's; of a slice of the first dimension nothing else is read ahead, counted or released."""
        self.check(name, shape)
        file, entry = self._entry(name)
        start, size = entry.start, entry.size
        if part is not None and part.dim == 0 and shape[0]:
            start, size = start + part.first * (size // shape[0]), (part.end - part.first) * (size // shape[0])
        file.file.expect(start, size)
        self._tell(size)
        self._read.append((file, start, size))
        return sliced(file.array(name), part)

    def dtype(self, name: str) -> str:
        """A tensor's dtype by the file's name for it: BF16, F8_E4M3, ..."""
        return self._entry(name)[1].dtype

    def file_of(self, name: str) -> str:
        return self._file(name).name

    def release(self) -> None:
        for file, start, size in self._read:
            file.file.release(start, size)
        self._read.clear()

    def _entry(self, name: str) -> tuple[TensorFile, Entry]:
        path = self._file(name)
        file = self._handle(path)
        entry = file.entries.get(name)
        if entry is None:
            raise StartError(
                f"tensor '{name}' cannot be read from '{path.name}': the index names it, the file has none"
            )
        return file, entry

    def _file(self, name: str) -> Path:
        file = self._files.get(name)
        if file is None:
            raise StartError(f"tensor '{name}' is missing in '{self._folder}'; is the checkpoint complete?")
        return file

    def _handle(self, path: Path) -> TensorFile:
        if path not in self._open:
            self._open[path] = TensorFile(path)
        return self._open[path]

    def _find(self, single: str) -> dict[str, Path]:
        folder = self._folder
        if single == SINGLE and (folder / INDEX).is_file():
            return {name: folder / file for name, file in read_index(folder / INDEX).items()}
        if (folder / single).is_file():
            return dict.fromkeys(self._handle(folder / single).entries, folder / single)
        shards = _shards(folder) if single == SINGLE else []
        if shards:
            return {name: path for path in shards for name in self._handle(path).entries}
        raise StartError(f"'{folder}' has no {single} and no {INDEX}; give a folder in Hugging Face layout")


def _shards(folder: Path) -> list[Path]:
    """The numbered files of a checkpoint without an index."""
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        match = _SHARD.fullmatch(path.name)
        if match is not None:
            found.setdefault((match[1], match[3]), {})[int(match[2])] = path
    for (stem, count), parts in found.items():
        missing = next((n for n in range(1, int(count) + 1) if n not in parts), None)
        if missing is not None:
            raise StartError(f"'{folder}' has no {stem}-{missing:05}-of-{count}.safetensors; download it again")
        return [parts[number] for number in sorted(parts)]
    return []


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        StartError: the index cannot be read, or names a file that is not in the folder.
    """
    try:
        files = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StartError(f"'{path}' cannot be read: {error!r}") from error
    if not isinstance(files, dict) or not all(isinstance(file, str) and _inside(file) for file in files.values()):
        raise StartError(f"'{path}': weight_map must name a file of the folder for each tensor; download it again")
    for file in dict.fromkeys(files.values()):
        if not (path.parent / file).is_file():
            raise StartError(f"'{path.name}' names the file '{file}', which is not there; download it again")
    return files


def _inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts
