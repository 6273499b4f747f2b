"""Weights that torch pickled. They are read only with --allow-pickle, and with torch installed.

`python -m inflight.checkpoint.pickled FOLDER` writes them as safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes

from inflight.checkpoint.files import PICKLED, Tensor, Tensors, read_index
from inflight.errors import StartError


def has_pickles(folder: Path) -> bool:
    """Whether a folder's weights are pickled."""
    return any((folder / name).is_file() for name in PICKLED)


def refusal(folder: Path) -> StartError:
    """The error for pickled weights that are not read, with what to do."""
    return StartError(
        f"'{folder}' has pickled weights only, which can run code when they are read; convert them to safetensors "
        f"where torch is installed, with `python -m inflight.checkpoint.pickled {folder}`, or pass --allow-pickle if "
        "you trust them"
    )


class PickledFiles(Tensors):
    """pytorch_model.bin, or several files with their index. torch reads no code from them (`weights_only`).

    Raises:
        StartError: torch is not installed, or a file cannot be read; the text names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Any] = _load(folder)
        self.names = list(self._tensors)
        self.size = sum(tensor.nbytes for tensor in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> list[int]:
        return list(self._tensor(name).shape)

    def whole(self, name: str) -> Tensor:
        return _array(self._tensor(name))

    def file_of(self, name: str) -> str:
        return PICKLED[0]

    def release(self) -> None:
        """Does nothing: torch owns the memory."""

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise StartError(f"tensor '{name}' is missing in '{self._folder}'; is the checkpoint complete?")
        return self._tensors[name]


def _load(folder: Path) -> dict[str, Any]:
    try:
        import torch  # only pickled weights need it
    except ImportError:
        raise StartError("reading pickled weights needs torch: pip install 'inflight-serving[torch]'") from None
    index = folder / PICKLED[1]
    files = list(dict.fromkeys(read_index(index).values())) if index.is_file() else [PICKLED[0]]
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            tensors.update(torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # unpickling raises anything
            raise StartError(f"'{folder / file}' cannot be read: {error}") from error
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise StartError(f"'{folder / files[0]}' holds something else than tensors by name")
    return tensors


def _array(tensor: Any) -> Tensor:
    import torch

    whole = tensor.detach().contiguous()
    if whole.dtype == torch.bfloat16:
        found: Tensor = whole.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return found
    try:
        return whole.numpy()  # type: ignore[no-any-return]
    except TypeError as error:
        raise StartError(f"pickled weights of {whole.dtype} are not read: {error}") from error


def convert(folder: Path) -> Path:
    """Writes a folder's pickled weights as one safetensors file beside them; returns its path.

    Raises:
        StartError: as for `PickledFiles`.
    """
    from safetensors.torch import save_file

    target = folder / "model.safetensors"
    # Tensors that share memory (tied ones) are written one by one.
    save_file({name: tensor.contiguous().clone() for name, tensor in _load(folder).items()}, target, {"format": "pt"})
    return target


if __name__ == "__main__":
    try:
        print(convert(Path(sys.argv[1])))
    except (IndexError, StartError) as problem:
        sys.exit(str(problem) if isinstance(problem, StartError) else __doc__)
