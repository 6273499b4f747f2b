"""The tensors of a folder's weight files, as they are written there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from inflight.errors import StartError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF_NAME = "model.gguf"
"""What a GGUF file is called in a model folder."""
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

Part = tuple[int, int, int]
"""(dimension, first, end): a rank's share of a tensor along one dimension."""


class TensorFiles:
    """One safetensors file, several with their index, or pickled weights. Nothing is read before it is asked for.

    Args:
        allow_pickle: read pytorch_model.bin where there are no safetensors.
        tell: called with the bytes of each tensor that was read.

    Raises:
        StartError: no weights, or a file that cannot be read; the text names it.
    """

    def __init__(self, folder: Path, allow_pickle: bool, tell: Callable[[int], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._stack = ExitStack()
        self._pickled: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if (folder / INDEX).is_file():
            self._files = {name: folder / file for name, file in self._index(folder / INDEX).items()}
        elif (folder / SINGLE).is_file():
            self._files = dict.fromkeys(list(self._handle(folder / SINGLE).keys()), folder / SINGLE)
        elif any((folder / name).is_file() for name in PICKLED):
            self._open_pickled(allow_pickle)
        else:
            raise StartError(f"'{folder}' has no {SINGLE} and no {INDEX}; give a folder in Hugging Face layout")
        self.size = sum(file.stat().st_size for file in dict.fromkeys(self._files.values()))

    def close(self) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._pickled

    @property
    def names(self) -> list[str]:
        return [*self._files, *self._pickled]

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it.

        Raises:
            StartError: it is missing, or its file cannot be read.
        """
        if name in self._pickled:
            return list(self._pickled[name].shape)
        file = self._file(name)
        try:
            return list(self._handle(file).get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(name, file, error) from error

    def check(self, name: str, wanted: Sequence[int]) -> None:
        """Raises StartError where the tensor is missing or has another shape."""
        found = self.shape(name)
        if found != list(wanted):
            where = PICKLED[0] if name in self._pickled else self._files[name].name
            raise StartError(
                f"tensor '{name}' in '{where}' has shape {found}, the config wants {list(wanted)}; are config.json "
                "and the weights of one model?"
            )

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it, in the dtype of the file.

        Args:
            shape: of the whole tensor.

        Raises:
            StartError: it is missing, broken or of another shape; the text names tensor and file.
        """
        self.check(name, shape)
        if name in self._pickled:
            whole = self._pickled[name]
            return whole if part is None else whole.narrow(part[0], part[1], part[2] - part[1])
        file = self._file(name)
        where = [slice(None)] * len(shape)
        if part is not None:
            where[part[0]] = slice(part[1], part[2])
        try:
            handle = self._handle(file)
            tensor: torch.Tensor = handle.get_slice(name)[tuple(where)] if shape else handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(name, file, error) from error
        self._tell(tensor.nbytes)
        return tensor

    def _file(self, name: str) -> Path:
        file = self._files.get(name)
        if file is None:
            raise StartError(f"tensor '{name}' is missing in '{self._folder}'; is the checkpoint complete?")
        return file

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise StartError(f"'{file}' cannot be read: {error}; is it whole? Download it again") from error
        return self._open[file]

    def _index(self, path: Path) -> dict[str, str]:
        try:
            found = json.loads(path.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StartError(f"'{path}' cannot be read: {error!r}") from error
        if not isinstance(found, dict) or not all(isinstance(file, str) and _inside(file) for file in found.values()):
            raise StartError(f"'{path}': weight_map must name a file of the folder for each tensor; download it again")
        for file in dict.fromkeys(found.values()):
            if not (self._folder / file).is_file():
                raise StartError(f"'{path.name}' names the file '{file}', which is not there; download it again")
        return found

    def _open_pickled(self, allowed: bool) -> None:
        if not allowed:
            raise StartError(
                f"'{self._folder}' has pickled weights only, which can run code when they are read; convert them to "
                "safetensors, or pass --allow-pickle if you trust them"
            )
        index = self._folder / PICKLED[1]
        files = dict.fromkeys(self._index(index).values()) if index.is_file() else {PICKLED[0]: None}
        for file in files:
            try:
                self._pickled.update(torch.load(self._folder / file, map_location="cpu", weights_only=True, mmap=True))
            except Exception as error:  # unpickling raises anything
                raise StartError(f"'{self._folder / file}' cannot be read: {error}") from error


def _inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts


def _unreadable(name: str, file: Path, error: Exception) -> StartError:
    return StartError(f"tensor '{name}' cannot be read from '{file.name}': {error}")
