"""Prints a page about the rooms of the package, drawn from its source: modules, what each is for, what it imports.

    python scripts/rooms.py > rooms.md

Nothing is imported. `make docs` makes a page of the site from it. The rules for imports are in docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Module(NamedTuple):
    """One file.

    Attributes:
        path: from the root of the repository.
        about: the first sentence of its docstring.
        imports: the rooms it imports when it is imported or when its functions run, in order of name.
    """

    path: Path
    about: str
    imports: tuple[str, ...]


def rooms(root: Path = ROOT) -> dict[str, list[Module]]:
    """The modules of each room, by the room's name."""
    found: dict[str, list[Module]] = {}
    for path in sorted((root / "inflight").rglob("*.py")):
        if "_pb2" in path.name:
            continue
        parts = path.relative_to(root / "inflight").with_suffix("").parts
        room = parts[0] if parts != ("__init__",) else "inflight"
        tree = ast.parse(path.read_text())
        imported = tuple(sorted({name for name in _imported(tree) if name != room}))
        found.setdefault(room, []).append(Module(path.relative_to(root), first_sentence(tree), imported))
    return found


def first_sentence(tree: ast.Module) -> str:
    text = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    match = re.match(r".*?\.(?= |$)", text)
    return (match.group() if match else text).rstrip(".:")


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "inflight":
                yield from parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("inflight."))


def page(found: dict[str, list[Module]]) -> str:
    """The page in Markdown: a section for each room."""
    lines = [
        "# Rooms",
        "",
        "Drawn from the source. What may import what: [architecture](architecture.md).",
        "",
    ]
    for room, modules in found.items():
        files = [module for module in modules if module.path.name != "__init__.py"]
        about = next((module.about for module in modules if len(module.path.parts) <= 3), "")
        imports = sorted({name for module in modules for name in module.imports})
        lines += [f"## {room}", "", f"{about}.", "", f"Imports: {', '.join(imports) or 'no other room'}.", ""]
        lines += ["| module | what | imports |", "|---|---|---|"]
        for module in files or modules:
            name = module.path.relative_to("inflight")
            lines.append(f"| `{name}` | {module.about.replace('|', '&#124;')} | {', '.join(module.imports)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(rooms()))
