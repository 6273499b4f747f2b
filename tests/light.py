"""An environment as `pip install inflight-serving` makes it: what the package requires, and nothing else.

It is made of links to what is installed here, in a fraction of a second, so that whole servers of the suite can run
there: that shows that no more is needed than pyproject.toml says.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import os
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import inflight
import mindspore_serving

ROOT = "inflight-serving"
NATIVE = {"kernels": "_native", "text": "_bpe", "wire": "_http2"}
"""Native modules by the rooms that they are in."""


def make_environment(folder: Path) -> str:
    """Makes it in an empty folder; returns its interpreter."""
    venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False).create(folder)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    measuring = ("coverage",) if "COVERAGE_PROCESS_CONFIG" in os.environ else ()  # `make coverage`
    for distribution in [each for name in (ROOT, *measuring) for each in requirements(name)]:
        _link(distribution, site)
    _own(site)
    return str(folder / "bin" / "python")


def requirements(name: str) -> list[importlib.metadata.Distribution]:
    """A distribution and everything that it asks for, extras that nobody names left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    asked: dict[tuple[str, str], None] = {}

    def add(name: str, extra: str) -> None:
        if (name, extra) in asked:
            return
        asked[name, extra] = None
        distribution = found.setdefault(name, importlib.metadata.distribution(name))
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for each in ("", *sorted(requirement.extras)):
                    add(canonicalize_name(requirement.name), each)

    add(canonicalize_name(name), "")
    return list(found.values())


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """What a distribution has in site-packages: whole packages; of namespaces, which others are in too, its part."""
    installed = Path(str(distribution.locate_file("")))
    for name, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        parts = Path(name).parts
        if parts[0] in ("..", "/", "__pycache__"):  # commands
            continue
        if distribution.metadata["Name"] == ROOT and not parts[0].endswith(".dist-info"):
            continue  # see `_own`
        depth = 1
        while depth < len(parts) and _is_namespace(installed.joinpath(*parts[:depth])):
            depth += 1
        place = site.joinpath(*parts[:depth])
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(installed.joinpath(*parts[:depth]))


def _is_namespace(folder: Path) -> bool:
    return not folder.name.endswith((".dist-info", ".libs")) and not (folder / "__init__.py").exists()


def _own(site: Path) -> None:
    """This package, from wherever it is imported here; its native modules may lie elsewhere."""
    for package in (inflight, mindspore_serving):
        source = Path(str(package.__file__)).parent
        (site / source.name).mkdir()
        for child in source.iterdir():
            if child.name not in NATIVE or package is not inflight:
                (site / source.name / child.name).symlink_to(child)
    for room, name in NATIVE.items():
        folder = site / "inflight" / room
        folder.mkdir()
        for child in (Path(str(inflight.__file__)).parent / room).iterdir():
            (folder / child.name).symlink_to(child)
        spec = importlib.util.find_spec(f"inflight.{room}.{name}")
        if spec is not None and spec.origin is not None and not (folder / Path(spec.origin).name).exists():
            (folder / Path(spec.origin).name).symlink_to(spec.origin)
