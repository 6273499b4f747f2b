"""Which call of which client is tried, and the table of it in docs/compatibility.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WORKS = "works"


@dataclass(frozen=True)
class Case:
    """One call of one client. `result` says what else than success is right."""

    surface: str
    client: str
    call: str
    result: str
    check: Callable[..., Any]

    @property
    def id(self) -> str:
        return re.sub(r"\W+", "_", f"{self.client} {self.call}")


CASES: list[Case] = []
TRIED: list[Case] = []
"""What tests of other files try."""


def case(surface: str, client: str, call: str, result: str = WORKS) -> Callable[[F], F]:
    """Puts a check into the table; `test_compatibility` runs it."""

    def add(check: F) -> F:
        CASES.append(Case(surface, client, call, result, check))
        return check

    return add


def tried_here(surface: str, client: str, call: str) -> Callable[[F], F]:
    """Puts what a test tries into the table."""

    def add(test: F) -> F:
        TRIED.append(Case(surface, client, call, WORKS, test))
        return test

    return add


def installed(client: str) -> str:
    try:
        return version(client)
    except PackageNotFoundError:
        return "-"


def table() -> str:
    """All cases, by surface, with the versions that were tried."""
    lines = []
    cases = [*CASES, *TRIED]
    for surface in dict.fromkeys(one.surface for one in cases):
        lines += [f"\n### {surface}\n", "| client | version | call | result |", "|---|---|---|---|"]
        lines += [
            f"| {one.client} | {installed(one.client)} | {one.call} | {one.result} |"
            for one in cases
            if one.surface == surface
        ]
    return "\n".join(lines) + "\n"


def without_versions(text: str) -> list[list[str]]:
    """The rows of a table; a Python that has no newer release of a client is not a difference."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [[cell for place, cell in enumerate(row) if place != 1] for row in rows]


def written() -> str:
    page = PAGE.read_text()
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)]


def write() -> None:
    """Puts the table into the page."""
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + "\n" + table() + page[page.index(END) :])
