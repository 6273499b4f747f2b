"""Whether a path is that of a GGUF file, by its name alone: for those who must not read it."""

from __future__ import annotations

from pathlib import Path

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()
