"""Which versions of a model are served, and whether its files have changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from inflight.repository.scan import Found

Snapshot: TypeAlias = "tuple[tuple[str, int, int], ...]"
"""Path, time of the last change and size of every file of a model."""

_LATEST = re.compile(r"latest(?::([1-9][0-9]{0,5}))?")


def chosen(policy: str, versions: Sequence[int]) -> list[int]:
    """The versions that a policy serves: `latest:n`, the n largest numbers; `all`; or numbers, `1,3`.

    Args:
        versions: those that there are, in ascending order.

    Returns:
        In ascending order; empty where none of the given numbers is there.
    """
    latest = _LATEST.fullmatch(policy)
    if latest is not None:
        return list(versions)[-int(latest[1] or 1) :]
    if policy == "all":
        return list(versions)
    wanted = [int(each) for each in policy.split(",")]
    return [version for version in versions if version in wanted]


def snapshot(found: Found) -> Snapshot:
    """The state of a model's files, links followed. A file that is gone while it is looked at has size -1."""
    places = {found.place: None, **dict.fromkeys(found.versions.values())}  # `rglob` enters no version that is a link
    files = sorted({file for place in places for file in ([place] if place.is_file() else place.rglob("*"))})
    states: list[tuple[str, int, int]] = []
    for file in files:
        if "__pycache__" in file.parts:  # written by a load itself
            continue
        states.append((str(file), *_state(file)))
    return tuple(states)


def _state(file: Path) -> tuple[int, int]:
    try:
        if file.is_dir():
            return 0, 0
        found = file.stat()
    except OSError:
        return 0, -1
    return found.st_mtime_ns, found.st_size
