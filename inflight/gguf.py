"""The model folder of a GGUF file: made once by another process, kept in the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from inflight.errors import StartError

SUFFIX = ".gguf"
_FORM = 2  # of the folder; counted up when it changes
_TIMEOUT = 600.0


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def model_folder(path: Path) -> Path:
    """A folder in Hugging Face layout: of a GGUF file the one that is made of it, which takes some seconds the first
    time; other paths are returned as they are.

    It lies in $XDG_CACHE_HOME/inflight/gguf (~/.cache/inflight/gguf) and holds the configuration, the tokenizer and a
    link to the file. Another file at the path, or another version of it, gets another folder.

    Raises:
        StartError: the file is broken, or of a kind that is not served; the text says which.
    """
    if not is_gguf(path):
        return path
    path = path.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inflight" / "gguf"
    about = path.stat()
    key = hashlib.sha256(f"{_FORM}\0{path}\0{about.st_size}\0{about.st_mtime_ns}".encode()).hexdigest()[:32]
    folder = cache / key
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as made:
            _make(path, Path(made))
            os.chmod(made, 0o755)
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise StartError(f"the folder for '{path}' cannot be made in '{cache}': {error}; set XDG_CACHE_HOME") from error
    return folder


def _make(path: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "inflight.models.gguf", str(path), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise StartError(
            f"'{path}' could not be prepared within {_TIMEOUT:.0f} s; use the model's checkpoint"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if "No module named" in last:
            last = f"GGUF files need the language models' packages ({last}); pip install 'inflight-serving[llm]'"
        elif done.returncode != 1:
            last = f"'{path}' could not be prepared (exit code {done.returncode}): {last}"
        raise StartError(last)
