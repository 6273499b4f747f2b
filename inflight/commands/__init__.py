"""What the command line can do, one file for each command. `inflight.cli` puts them together."""

from inflight.commands import bench, call, serve
from inflight.commands.options import Command, Parser, UsageError, add_command, place_rest, resolve

COMMANDS: tuple[Command, ...] = (serve.COMMAND, call.COMMAND, bench.COMMAND)

__all__ = ["COMMANDS", "Command", "Parser", "UsageError", "add_command", "place_rest", "resolve"]
