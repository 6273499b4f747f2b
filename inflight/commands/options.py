"""Flags, environment variables and a configuration file as one thing.

An `Option` has one name. `--max-message-mb`, `INFLIGHT_MAX_MESSAGE_MB` and the key `max_message_mb` of a file are
three places to write its text, asked in this order; one parser reads the text from wherever it came.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from inflight import log

PREFIX = "INFLIGHT_"


class UsageError(Exception):
    """What the user wrote cannot be used; the text is one line that says what to write instead."""


@dataclass(frozen=True)
class Option:
    """One setting of a command.

    Attributes:
        name: with hyphens, as after `--`.
        parse: reads the text and raises ValueError with a hint.
        help: one sentence.
        default: the value where the option is not given anywhere.
        metavar: how the help names its value; None for a switch, which takes none.
        many: a list of texts: a repeated flag, a list in a file, separated by `os.pathsep` in the environment.
        positional: written without a flag.
    """

    name: str
    parse: Callable[[str], Any]
    help: str
    default: Any = None
    metavar: str | None = None
    many: bool = False
    positional: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        summary: a few words for the list of commands.
        description, examples: what its help begins and ends with.
        run: called with the values by key; returns the exit code.
    """

    name: str
    summary: str
    description: str
    examples: str
    options: tuple[Option, ...]
    run: Callable[[Mapping[str, Any]], int]


CONFIG = Option("config", str, "Read options from this file, JSON or TOML.", metavar="FILE")

RULES = """\
Every option can also be given as the environment variable shown, or as a key of the file
named by --config (the option's name with _ for -). A flag goes before a variable, and a
variable before the file. Paths are relative to the working directory."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest known flag."""

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        guesses = [
            f"{word} -> {near[0]}"
            for word in message.replace("=", " ").split()
            if word.startswith("--") and word not in known
            for near in [difflib.get_close_matches(word, known, 1)]
            if near
        ]
        hint = f" (did you mean {', '.join(guesses)}?)" if guesses else ""
        self.exit(2, f"{self.prog}: {message}{hint}; see {self.prog} --help\n")


def add_command(commands: Any, command: Command) -> None:
    """Adds the sub-command's parser; its values stay texts until `resolve`."""
    parser = commands.add_parser(
        command.name,
        help=command.summary,
        description=command.description,
        epilog=f"{command.examples}\n{RULES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=command, parser=parser)
    for option in (*command.options, CONFIG):
        shown = f"{option.help} [{option.variable}]".replace("%", "%%")
        if option.positional:
            nargs = "*" if option.many else "?"
            parser.add_argument(option.key, nargs=nargs, metavar=option.metavar, help=shown)
        elif option.metavar is None:
            parser.add_argument(f"--{option.name}", dest=option.key, action="store_const", const="true", help=shown)
            parser.add_argument(
                f"--no-{option.name}", dest=option.key, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            action = "append" if option.many else "store"
            parser.add_argument(f"--{option.name}", dest=option.key, action=action, metavar=option.metavar, help=shown)


def place_rest(command: Command, given: dict[str, Any], rest: Sequence[str]) -> list[str]:
    """Gives words that argparse left over, because a flag stood between them, to the positional options.

    Returns:
        What still fits nowhere.
    """
    left = list(rest)
    for option in command.options:
        if not option.positional or any(word.startswith("-") for word in left):
            continue
        if option.many:
            given[option.key] = [*given.get(option.key, ()), *left]
            left = []
        elif left and not given.get(option.key):
            given[option.key] = left.pop(0)
    return left


def resolve(command: Command, given: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """The value of every option.

    Args:
        given: texts from the command line by key; absent where not written.

    Raises:
        UsageError: a text that its option does not accept, a file that cannot be read, or an unknown key in it.
    """
    file = given.get(CONFIG.key) or env.get(CONFIG.variable)
    written = read_file(Path(file), command.options) if file else {}
    values: dict[str, Any] = {}
    for option in command.options:
        texts, source = _texts(option, given, env, written, file)
        if texts is None:
            values[option.key] = option.default
            continue
        try:
            parsed = [option.parse(text) for text in texts]
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from None
        values[option.key] = parsed if option.many else parsed[-1]
    return values


def _texts(
    option: Option, given: Mapping[str, Any], env: Mapping[str, str], written: Mapping[str, list[str]], file: str | None
) -> tuple[list[str] | None, str]:
    """What was written for an option, and where; None where nothing was."""
    texts = given.get(option.key)
    if texts is not None and texts != []:
        source = str(option.metavar) if option.positional else f"--{option.name}"
        return texts if isinstance(texts, list) else [texts], source
    if option.variable in env:
        text = env[option.variable]
        return text.split(os.pathsep) if option.many else [text], option.variable
    if option.key in written:
        return written[option.key], f"'{option.key}' in {file}"
    return None, ""


def read_file(path: Path, options: Sequence[Option]) -> dict[str, list[str]]:
    """The options of a JSON or TOML file as the texts that a flag would have.

    Raises:
        UsageError: not readable, not a table of options, or a key that is no option.
    """
    known = {option.key: option for option in options}
    texts: dict[str, list[str]] = {}
    for key, value in _load(path).items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"use one of: {', '.join(known)}"
            raise UsageError(f"'{key}' in {path} is no option; {hint}")
        items = value if option.many and isinstance(value, list) else [value]
        texts[option.key] = [_as_text(item) for item in items if item is not None]
    return {key: items for key, items in texts.items() if items}


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(_as_text(item) for item in value)
    return str(value)


def _load(path: Path) -> dict[str, Any]:
    toml = path.suffix.lower() == ".toml"
    try:
        text = path.read_text()
        loaded = _toml().loads(text) if toml else json.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except ImportError:
        raise UsageError(f"{path}: TOML needs Python 3.11 or newer; write the file as JSON") from None
    except ValueError as error:
        kind = "TOML" if toml else "JSON (name a TOML file *.toml)"
        raise UsageError(f"{path} is not valid {kind}: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f'{path} should hold one object, like {{"http": "127.0.0.1:8080"}}')
    return loaded


def _toml() -> Any:
    return importlib.import_module("tomllib")  # not in Python 3.10


def stop_cleanly() -> None:
    """Until a server takes them over, SIGINT and SIGTERM end the process with 0: nobody is served yet."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))


def configure_log(level: str | None) -> None:
    """Sets up the log after the environment, or at a level of TGI's names, which workers then get too."""
    names = {"trace": "debug", "warn": "warning", **{name: name for name in log.LEVEL_NAMES}}
    name = names.get((level or "").lower())
    if name is not None:
        os.environ.update(log.variables(name))
    try:
        log.configure(os.environ)
    except ValueError as error:
        raise UsageError(str(error)) from None
