"""Fetches with huggingface_hub, which only this module imports. Cache, token, endpoint, offline mode and transfer are
the library's own."""

from __future__ import annotations

import errno
import fnmatch
import glob
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflight.errors import InflightError, StartError
from inflight.hub.address import HubModel
from inflight.hub.choose import Choice, Wanted, choose
from inflight.startup import ProgressBar, size_text, switch_off, tell

_POLL = 0.5
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class Fetched:
    """A fetched model on this disk.

    Attributes:
        path: the model's folder, or its GGUF file (the first of a split one, the others beside it).
        commit: of the repository.
    """

    path: Path
    commit: str


def download(model: HubModel, wanted: Wanted, token: str | None = None) -> Fetched:
    """Fetches the needed files that are not on this disk. Reports its choice and its progress on stderr.

    If the hub cannot be reached, or HF_HUB_OFFLINE is set, the model comes from its cache.

    Args:
        token: sent to the hub; None: the one that `hf auth login` has stored.

    Raises:
        StartError: it cannot be fetched; one line that says why and what to do.
    """
    switch_off()
    try:
        import huggingface_hub as library
        import huggingface_hub.constants
        import huggingface_hub.errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise StartError(
            f"'{model}' has to be fetched by huggingface_hub; pip install huggingface_hub ({error})"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our error repeats its warnings
    if not sys.stderr.isatty() and library.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        return _download(library, model, wanted, token)
    except InflightError:
        raise
    except Exception as error:  # the library and its HTTP client raise a dozen kinds
        raise StartError(_told(library, model, error, token)) from error


def _download(library: Any, model: HubModel, wanted: Wanted, token: str | None) -> Fetched:
    cache = Path(model.cache or library.constants.HF_HUB_CACHE).expanduser()
    home = cache / f"models--{model.repo.replace('/', '--')}"
    try:
        api = library.HfApi(library_name="inflight", token=token)
        info = api.model_info(model.repo, revision=model.revision, files_metadata=True)
    except Exception as error:
        if not _unreachable(library, error):
            raise
        return _cached(library, model, wanted, home, error)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    choice = choose(model.repo, list(sizes), wanted)
    if choice.said:
        tell(choice.said)
    snapshot = home / "snapshots" / info.sha
    missing = {name: sizes[name] for name in choice.files if not (snapshot / name).exists()}
    if not missing and model.revision in (info.sha, None) and _ref(home, "main") == info.sha:
        return _fetched(snapshot, choice)  # saves two requests
    _check_space(model, cache, sum(missing.values()))
    with _Watched(model, home, snapshot, missing):
        found = library.snapshot_download(
            model.repo,
            revision=model.revision,
            cache_dir=model.cache,
            token=token,
            library_name="inflight",
            allow_patterns=[glob.escape(name) for name in choice.files],
        )
    return _fetched(Path(found), choice)


def _ref(home: Path, revision: str) -> str:
    """The commit of a branch or tag when it was last fetched; empty if it never was."""
    ref = home / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else ""


def _fetched(snapshot: Path, choice: Choice) -> Fetched:
    return Fetched(snapshot / choice.gguf if choice.gguf else snapshot, snapshot.name)


def _cached(library: Any, model: HubModel, wanted: Wanted, home: Path, why: Exception) -> Fetched:
    """The model from the cache.

    Raises:
        StartError: it is not there, or not completely.
    """
    reason = _reason(library, why)
    commit = _ref(home, model.revision or "main") or model.revision or ""
    snapshot = home / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise StartError(f"{reason}, and '{model}' is not in its cache {home.parent}; {_remedy(library)}")
    names = [str(path.relative_to(snapshot)) for path in sorted(snapshot.rglob("*")) if path.is_file()]
    try:
        choice = choose(model.repo, names, wanted)
    except StartError as error:
        raise StartError(f"{reason}, and of its cache {home.parent}: {error}; {_remedy(library)}") from error
    # The library stored the list of the snapshot's files when it fetched them.
    library.snapshot_download(
        model.repo,
        revision=commit,
        cache_dir=model.cache,
        local_files_only=True,
        allow_patterns=[glob.escape(name) for name in choice.files],
    )
    _check_shards(model, choice)
    if not library.constants.HF_HUB_OFFLINE:
        tell(f"{reason}: taking {model} from the cache, commit {commit[:12]}")
    if choice.said:
        tell(choice.said)
    return _fetched(snapshot, choice)


def _check_shards(model: HubModel, choice: Choice) -> None:
    """Raises StartError if shards are missing, as after an interrupted fetch."""
    counts = [name.rpartition("-of-")[2] for name in choice.files if fnmatch.fnmatch(name, "model-*-of-*.safetensors")]
    expected = int(counts[0].partition(".")[0]) if counts else 0
    if len(counts) != expected:
        raise StartError(f"'{model}' is in the cache in part only: {len(counts)} of {expected} files of its weights")


def _check_space(model: HubModel, cache: Path, needed: int) -> None:
    """Raises StartError before the fetch if the disk of the cache has too little space."""
    place = next((path for path in (cache, *cache.parents) if path.exists()), cache)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StartError(
            f"'{model}' needs {size_text(needed)} in '{cache}', where {size_text(free)} are free; free some, or set "
            "HF_HOME to a folder on a larger disk"
        )


class _Watched:
    """While it is open, reports progress on stderr in lines. On terminals the library shows its own bars.

    Counts the bytes on the disk, so that it does not depend on how the library transfers.
    """

    def __init__(self, model: HubModel, home: Path, snapshot: Path, missing: Mapping[str, int]) -> None:
        self._blobs = home / "blobs"
        self._snapshot = snapshot
        self._missing = dict(missing)
        self._progress = ProgressBar(f"fetching {model.repo}", sum(missing.values()))

    def __enter__(self) -> None:
        if self._missing and not sys.stderr.isatty():
            self._progress.watch(self._count, _POLL)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close(whole=kind is None and bool(self._missing))

    def _count(self) -> int:
        done = sum(size for name, size in self._missing.items() if (self._snapshot / name).exists())
        try:
            return done + sum(file.stat().st_size for file in self._blobs.glob("*.incomplete"))
        except OSError:  # a file was just completed and renamed
            return done


# Errors


def _unreachable(library: Any, error: Exception) -> bool:
    """Whether the hub gave no answer about the model: offline, no connection, or an error of its own."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    return isinstance(error, library.errors.OfflineModeIsEnabled) or not isinstance(
        error, (library.errors.HfHubHTTPError, ValueError)
    )


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _reason(library: Any, error: BaseException) -> str:
    endpoint = library.constants.ENDPOINT
    if isinstance(error, library.errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = _status(error)
    if status is not None:
        return f"the hub at {endpoint} answers {status}"
    return f"the hub at {endpoint} cannot be reached ({_first_line(error)})"


def _remedy(library: Any) -> str:
    if library.constants.HF_HUB_OFFLINE:
        return "unset HF_HUB_OFFLINE once, or give the path of a folder"
    return "look at the network, HTTPS_PROXY and HF_ENDPOINT, or give the path of a folder"


def _told(library: Any, model: HubModel, error: Exception, token: str | None) -> str:
    """One line for any error of the library."""
    errors, endpoint, shown = library.errors, library.constants.ENDPOINT, bool(token or library.get_token())
    status = _status(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, errors.GatedRepoError):
        ours = "the account of HF_TOKEN has no access" if shown else "HF_TOKEN is not set"
        return f"'{model}' is gated, and {ours}: accept its terms at {endpoint}/{model.repo} and set HF_TOKEN"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"'{model.repo}' has no revision '{model.revision}'; give a branch, a tag or a commit of it"
    if isinstance(cause, errors.RepositoryNotFoundError):
        private = "is private to others" if shown else "is private, which needs HF_TOKEN"
        return (
            f"'{model.repo}' is no path here, and the hub at {endpoint} has no model of that name, or it {private}; "
            "check the spelling"
        )
    if status in (401, 403):
        return f"the hub at {endpoint} refuses the token ({status}); set HF_TOKEN to a valid one, or unset it"
    if _full(error):
        return f"'{model}' cannot be fetched: the disk is full; free some space, or set HF_HOME to another disk"
    if isinstance(error, PermissionError):
        return f"'{model}' cannot be fetched: {error}; set HF_HOME to a folder that can be written"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or _unreachable(library, error):
        return f"'{model}' was not fetched to its end: {_first_line(cause or error)}; start again to go on"
    return f"'{model}' cannot be fetched: {type(error).__name__}: {_first_line(error)}"


def _full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
