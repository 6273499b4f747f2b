"""Checkpoints in Hugging Face layout, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from inflight.errors import StartError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

Part = tuple[int, int, int]
"""(dimension, first, end): a rank's share of a tensor along one dimension."""


class Checkpoint:
    """The tensors of a folder; a context manager. Nothing is read before it is asked for.

    Args:
        folder: holds one safetensors file, or several with their index.
        progress: called with the share of the bytes that were read so far.
        allow_pickle: read pytorch_model.bin where there are no safetensors.

    Raises:
        StartError: no weights, or a file that cannot be read; the text names it.
    """

    def __init__(
        self, folder: Path, progress: Callable[[float], None] | None = None, allow_pickle: bool = False
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._stack = ExitStack()
        self._pickled: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._done = 0
        self._total = 0
        self._used: dict[str, None] = {}
        if (folder / INDEX).is_file():
            self._files = {name: folder / file for name, file in self._index(folder / INDEX).items()}
        elif (folder / SINGLE).is_file():
            self._files = dict.fromkeys(self._keys(folder / SINGLE), folder / SINGLE)
        elif any((folder / name).is_file() for name in PICKLED):
            self._open_pickled(allow_pickle)
        else:
            raise StartError(f"'{folder}' has no {SINGLE} and no {INDEX}; give a folder in Hugging Face layout")
        self._total = sum(file.stat().st_size for file in dict.fromkeys(self._files.values()))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files or name in self._pickled

    @property
    def names(self) -> list[str]:
        return [*self._files, *self._pickled]

    def unused(self) -> list[str]:
        """Tensors that nobody asked for."""
        return [name for name in self.names if name not in self._used]

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it, in the checkpoint's dtype.

        Args:
            shape: of the whole tensor, as the config wants it.

        Raises:
            StartError: it is missing, broken or of another shape; the text names tensor and file.
        """
        self._used[name] = None
        if name in self._pickled:
            whole = self._pickled[name]
            self._check(name, "pytorch_model.bin", whole.shape, shape)
            return whole if part is None else whole.narrow(part[0], part[1], part[2] - part[1])
        file = self._files.get(name)
        if file is None:
            raise StartError(f"tensor '{name}' is missing in '{self._folder}'; is the checkpoint complete?")
        try:
            view = self._handle(file).get_slice(name)
            self._check(name, file.name, view.get_shape(), shape)
            where = [slice(None)] * len(shape)
            if part is not None:
                where[part[0]] = slice(part[1], part[2])
            tensor: torch.Tensor = view[tuple(where)] if shape else self._handle(file).get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise StartError(f"tensor '{name}' cannot be read from '{file.name}': {error}") from error
        self._tell(tensor.nbytes)
        return tensor

    def _tell(self, size: int) -> None:
        self._done += size
        if self._progress is not None and self._total:
            self._progress(min(1.0, self._done / self._total))

    def _check(self, name: str, file: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        if list(found) != list(wanted):
            raise StartError(
                f"tensor '{name}' in '{file}' has shape {list(found)}, the config wants {list(wanted)}; are "
                "config.json and the weights of one model?"
            )

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise StartError(f"'{file}' cannot be read: {error}") from error
        return self._open[file]

    def _keys(self, file: Path) -> list[str]:
        return list(self._handle(file).keys())

    def _index(self, path: Path) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(path.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartError(f"'{path}' cannot be read: {error!r}") from error
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
