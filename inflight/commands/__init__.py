"""The commands of the command line, one file for each. `inflight.cli` puts them together."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inflight.commands.options import Command, Parser, UsageError, add_command, in_force, place_rest, resolve

if TYPE_CHECKING:
    COMMANDS: tuple[Command, ...]

NAMES = {"serve": "serve", "agents": "agents", "client": "call", "bench": "bench", "models": "models"}
"""The names of the commands, with those of their files here."""

__all__ = [
    "COMMANDS",
    "NAMES",
    "Command",
    "Parser",
    "UsageError",
    "add_command",
    "command",
    "in_force",
    "place_rest",
    "resolve",
]


def command(name: str) -> Command:
    """The command of one of `NAMES`. The others are not imported, which would delay a server's start."""
    found: Command = import_module(f"inflight.commands.{NAMES[name]}").COMMAND
    return found


def __getattr__(name: str) -> Any:
    if name == "COMMANDS":
        return tuple(command(each) for each in NAMES)
    raise AttributeError(f"module 'inflight.commands' has no attribute {name!r}")
