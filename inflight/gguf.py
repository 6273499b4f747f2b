"""Whether a path is that of a GGUF file, by its name alone: for those who must not read it."""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def model_folder(path: Path) -> Path:
    """What a model is opened from: a folder or a GGUF file. Links to files are not followed: beside them, not beside
    what they mean, lie the other parts and the files of the tokenizer.
    """
    return path.absolute() if is_gguf(path) else path
