"""Reads the text that a user gives for a model: a path, or the id of a model of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from inflight.errors import ConfigError

_HOST = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://", re.IGNORECASE)
_NAME = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ID = re.compile(rf"(?P<repo>{_NAME}(?:/{_NAME})?)(?::(?P<file>[^@:]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_PAGE = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?:/(?P<file>.+?))?/?", re.ASCII
)
_LONGEST = 96
_FILES = (".gguf", ".onnx", ".mindir", ".pt", ".pt2", ".pth", ".ms", ".om", ".py", ".json", ".toml", ".safetensors")
"""Endings of paths: a text with one of them is taken for a path even if no such file exists."""


@dataclass(frozen=True)
class HubModel:
    """A model or an adapter of the hub, as the user gave it.

    Attributes:
        repo: `org/name`.
        file: for a repository of GGUF files, a quantisation (`Q4_K_M`) or a file's name; empty: `choose` picks one.
        revision: branch, tag or commit; None: the main branch.
        cache: folder to keep it in; None: huggingface_hub's (HF_HOME, HF_HUB_CACHE).
    """

    repo: str
    file: str = ""
    revision: str | None = None
    cache: str | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    def __str__(self) -> str:
        """A text that `parse` reads as this model again."""
        file = f":{self.file}" if self.file else ""
        return f"hf.co/{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def parse(text: str, revision: str | None = None, cache: str | None = None, *, bare: bool = False) -> HubModel | None:
    """The model of the hub that a text names; None if it has another form. Does not look at the disk.

    The forms: `org/name`, `org/name:Q4_K_M`, `org/name@revision`, each also after `hf.co/` or
    `https://huggingface.co/`; and the addresses of the hub's pages.

    Args:
        revision: used if the text names none.
        bare: a name without an owner is an id too (`gpt2`), as it is after `hf.co/`.

    Raises:
        ConfigError: it begins like an address of the hub but is not a valid one.
    """
    rest = _HOST.sub("", text, count=1) if _HOST.match(text) else None
    given = text if rest is None else rest.rstrip("/")
    match = _ID.fullmatch(given) or (None if rest is None else _PAGE.fullmatch(given))
    if match is not None and _repo(match["repo"]) and (rest is not None or bare or "/" in match["repo"]):
        return HubModel(match["repo"], match["file"] or "", match["revision"] or revision, cache)
    if rest is not None:
        raise ConfigError(f"'{text}' is no model of the hub; write hf.co/org/name or hf.co/org/name:Q4_K_M")
    return None


def locate(
    given: str | Path,
    base: Path | None = None,
    *,
    revision: str | None = None,
    cache: str | None = None,
    bare: bool = False,
) -> Path | HubModel:
    """The path or the hub model that a text names. An existing path takes precedence over a hub model of the same name.

    If the path does not exist but its folder does, an ambiguous text is taken for a mistyped path: the hub is not
    asked, and `hint` says what to write to ask it. A `Path` is always a path.

    Args:
        base: the folder that relative paths start from; None: the working directory.
        revision, cache, bare: as for `parse`.

    Returns:
        A path (absolute where `base` is given), which need not exist, or a model of the hub.

    Raises:
        ConfigError: as `parse`.
    """
    path = Path(given) if base is None else base / given
    if isinstance(given, Path) or (not _HOST.match(given) and os.path.lexists(path)):
        return path
    if _HOST.match(given):
        found = parse(given, revision, cache)
        assert found is not None
        return found
    if given.lower().endswith(_FILES) or (path.parent.is_dir() and "/" in given):
        return path
    return parse(given, revision, cache, bare=bare) or path


def hint(given: str | Path) -> str:
    """For a path that does not exist: the text to write for a model of the hub."""
    found = parse(given) if isinstance(given, str) and not _HOST.match(given) else None
    if found is not None:
        return f"for the model of the hub write {found}"
    return "a model of the hub is written org/name"


def _repo(text: str) -> bool:
    """Whether the hub would take the name: its rules beyond the letters."""
    return len(text) <= _LONGEST and "--" not in text and ".." not in text and not text.endswith(".git")
