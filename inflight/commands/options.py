"""Options that can be set by a flag, an environment variable or a configuration file.

An `Option` has one name. `--max-message-mb`, `INFLIGHT_MAX_MESSAGE_MB` and the key `max_message_mb` of a file are three
places for its text; the first that has it wins. The same parser reads the text from all of them. A file may also hold a
list of models, each with options of its own.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from inflight import log
from inflight.commands.files import FileError, dump, load
from inflight.config import PREFIX, Field, RestConfig


class UsageError(Exception):
    """A mistake in the user's options; the text is one line that says what to write instead."""


@dataclass(frozen=True)
class Option:
    """One setting of a command.

    Attributes:
        name: with hyphens, as after `--`.
        parse: reads the text and raises ValueError with a hint.
        help: one sentence.
        default: the value if the option is not given anywhere.
        metavar: how the help names its value; None for a switch, which takes none.
        many: a list of texts: a repeated flag, a list in a file, separated by `os.pathsep` in the environment.
        positional: written without a flag.
        of_model: one model of several may have its own.
        secret: its value is never printed.
    """

    name: str
    parse: Callable[[str], Any]
    help: str
    default: Any = None
    metavar: str | None = None
    many: bool = False
    positional: bool = False
    of_model: bool = False
    secret: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()

    @classmethod
    def of(cls, field: Field, of_model: bool = False) -> Option:
        """The option that sets a field of a configuration."""
        setting = field.setting
        metavar = setting.metavar or None
        return cls(
            field.flag,
            setting.parse,
            field.help,
            field.default,
            metavar,
            setting.many,
            of_model=of_model,
            secret=setting.secret,
        )


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        summary: a few words for the list of commands.
        description, examples: the beginning and the end of its help.
        run: takes the values by key; returns the exit code.
    """

    name: str
    summary: str
    description: str
    examples: str
    options: tuple[Option, ...]
    run: Callable[[Mapping[str, Any]], int]

    @property
    def models(self) -> bool:
        """Whether its configuration file may list models."""
        return any(option.of_model for option in self.options)


CONFIG = Option("config", str, "Read options from this file: YAML (*.yaml), TOML (*.toml) or JSON.", metavar="FILE")

PRINT = Option("print-config", str, "Print what is in force as a file for --config, and end.")

MODELS = "models"
"""The key of the list of models in a file."""

PATH = "path"
"""The key of a model's path in that list."""

RULES = """\
Every option can also be given as the environment variable shown, or as a key of the file
named by --config (the option's name with _ for -). A flag goes before a variable, and a
variable before the file. Paths are relative to the working directory."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, with the nearest known flag."""

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
    for option in (*command.options, CONFIG, *([PRINT] if command.models else ())):
        variable = "" if option is PRINT else f" [{option.variable}]"
        shown = f"{option.help}{variable}".replace("%", "%%")
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
        The words that no option takes.
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


@dataclass(frozen=True)
class _Place:
    """A table of a file.

    Attributes:
        name: for people.
        texts: by key, as they would be written after flags.
    """

    name: str
    texts: Mapping[str, list[str]]


def resolve(command: Command, given: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """The value of every option; under `MODELS` the models of a file, each with its `PATH` and its value of every
    option.

    Args:
        given: texts from the command line by key, for the options written there.

    Raises:
        UsageError: a text that its option does not accept, a file that cannot be read, or an unknown key in it.
    """
    whole, models = _places(command, given, env)
    values = {option.key: _value(option, _texts(option, given, env, *whole)) for option in command.options}
    values[MODELS] = [
        {
            **values,
            **{
                option.key: _value(option, _texts(option, given, env, place, *whole))
                for option in command.options
                if option.key in place.texts
            },
            PATH: place.texts[PATH][0],
        }
        for place in models
    ]
    return values


def in_force(command: Command, given: Mapping[str, Any], env: Mapping[str, str]) -> str:
    """The values that `resolve` returns, as the text of a configuration file.

    Raises:
        UsageError: as in `resolve`.
    """
    resolve(command, given, env)
    whole, models = _places(command, given, env)
    table: dict[str, Any] = {}
    for option in command.options:
        texts, _ = _texts(option, given, env, *whole)
        # A file that is shown around must not hold a secret.
        table[option.key] = None if option.secret else _plain(option, texts)
    listed = [
        {
            PATH: place.texts[PATH][0],
            **{
                option.key: _plain(option, _texts(option, given, env, place, *whole)[0])
                for option in command.options
                if option.key in place.texts
            },
        }
        for place in models
    ]
    return dump({**table, MODELS: listed} if listed else table)


def _plain(option: Option, texts: list[str] | None) -> Any:
    """An option's texts as a value for a file: a number or a boolean if that is the same."""
    if texts is None and option.many:
        return list(option.default)
    if texts is None:
        return _as_text(list(option.default)) if isinstance(option.default, tuple) else option.default
    if option.many:
        return list(texts)  # a copy, because YAML writes a reference for a list that occurs twice
    value = option.parse(texts[-1])
    return (
        value if isinstance(value, bool) or (isinstance(value, (int, float)) and str(value) == texts[-1]) else texts[-1]
    )


def _value(option: Option, found: tuple[list[str] | None, str]) -> Any:
    texts, source = found
    if texts is None:
        return list(option.default) if option.many else option.default
    try:
        parsed = [option.parse(text) for text in texts]
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from None
    return parsed if option.many else parsed[-1]


def _texts(
    option: Option, given: Mapping[str, Any], env: Mapping[str, str], *places: _Place
) -> tuple[list[str] | None, str]:
    """The texts given for an option, and their place for error messages; None if none was given."""
    texts = given.get(option.key)
    if texts is not None and texts != []:
        source = str(option.metavar) if option.positional else f"--{option.name}"
        return texts if isinstance(texts, list) else [texts], source
    if option.variable in env:
        text = env[option.variable]
        return text.split(os.pathsep) if option.many else [text], option.variable
    for place in places:
        if option.key in place.texts:
            return place.texts[option.key], f"'{option.key}' in {place.name}"
    return None, ""


def _places(command: Command, given: Mapping[str, Any], env: Mapping[str, str]) -> tuple[list[_Place], list[_Place]]:
    """The tables of a configuration file: its own, and those of its models."""
    file = given.get(CONFIG.key) or env.get(CONFIG.variable)
    if not file:
        return [], []
    try:
        table = load(Path(file))
    except FileError as error:
        raise UsageError(str(error)) from None
    own = [option for option in command.options if option.of_model]
    models = table.pop(MODELS, None) if command.models else None
    whole = _Place(str(file), _read(table, str(file), command.options, [MODELS] if command.models else []))
    if models is None:
        return [whole], []
    if not isinstance(models, list) or not all(isinstance(each, dict) for each in models):
        raise UsageError(
            f"'{MODELS}' in {file} should be a list of objects, each with its {PATH}: [{{{PATH}: model.onnx}}]"
        )
    return [whole], [_model(f"{MODELS}[{at}] in {file}", each, own, command.options) for at, each in enumerate(models)]


def _model(name: str, table: Mapping[str, Any], own: Sequence[Option], options: Sequence[Option]) -> _Place:
    path = Option(PATH, str, "")
    elsewhere = {option.key for option in options if not option.of_model}
    for key in table:
        if key.replace("-", "_") in elsewhere:
            raise UsageError(f"'{key}' in {name} is said of the whole server; write it beside '{MODELS}'")
    texts = _read(table, name, [path, *own])
    if PATH not in texts:
        raise UsageError(f"{name} has no '{PATH}'; write {PATH}: and what to serve")
    return _Place(name, texts)


def _read(
    table: Mapping[str, Any], place: str, options: Sequence[Option], more: Sequence[str] = ()
) -> dict[str, list[str]]:
    """The options of a table, as the texts that would be written after flags.

    Args:
        more: further keys to suggest beside the options.

    Raises:
        UsageError: a key that is not an option.
    """
    known = {option.key: option for option in options}
    texts: dict[str, list[str]] = {}
    for key, value in table.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            near = difflib.get_close_matches(key, [*known, *more], 1)
            hint = f"did you mean '{near[0]}'?" if near else f"use one of: {', '.join([*known, *more])}"
            raise UsageError(f"'{key}' in {place} is no option; {hint}")
        items = _items(value) if option.many else [value]
        texts[option.key] = [_as_text(item) for item in items if item is not None]
    return {key: items for key, items in texts.items() if items}


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [{key: item} for key, item in value.items()]
    return value if isinstance(value, list) else [value]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(_as_text(item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={_as_text(item)}" for key, item in value.items())
    return str(value)


def platform_routes(env: Mapping[str, str], rest: RestConfig = RestConfig()) -> RestConfig:
    """The configuration of the routes, with the paths that Google's platform sets in the environment."""
    predict, health = env.get("AIP_PREDICT_ROUTE"), env.get("AIP_HEALTH_ROUTE")
    return RestConfig(rest.status_codes, (predict,) if predict else (), (health,) if health else (), rest.tgi)


def configure_log(level: str | None, as_json: bool = False) -> None:
    """Configures the log from the environment, or at a level by TGI's name, which workers inherit.

    Args:
        as_json: every line is an object, those of workers too.

    Raises:
        UsageError: the environment has an invalid value.
    """
    names = {"trace": "debug", "warn": "warning", **{name: name for name in log.LEVEL_NAMES}}
    name = names.get((level or "").lower())
    if name is not None:
        os.environ.update(log.variables(name))
    if as_json:
        os.environ[log.JSON_OUTPUT] = "true"
    try:
        log.configure(os.environ)
    except ValueError as error:
        raise UsageError(str(error)) from None
