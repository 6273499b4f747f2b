"""Prints the table of HTTP routes between the two marks in docs/serving.md.

python scripts/routes.py
"""

from __future__ import annotations

from inflight.frontends.app import DOORS
from inflight.frontends.routes import Access, Events, Route

_EVENTS = {Events.NEVER: "", Events.ASKED: "; events where asked for", Events.ALWAYS: "; events"}


def table() -> str:
    """One row per route: its method and path, its purpose, whether it needs the API key."""
    rows = ["| route | protocol | what | key |", "|---|---|---|---|"]
    for door in DOORS:
        for route in door.routes:
            key = "" if route.access is Access.OPEN else "yes"
            rows.append(
                f"| `{route.verb} {shown(route)}` | {door.name} | {route.about}{_EVENTS[route.events]} | {key} |"
            )
    return "\n".join(rows)


def shown(route: Route) -> str:
    """The path in the documentation's form."""
    return route.path.replace("*}", "}").replace("{", "<").replace("}", ">")


if __name__ == "__main__":
    print(table())
