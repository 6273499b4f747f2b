"""What is written once of a setting, beside its field: how a command line, a file and a script may say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import msgspec


@dataclass(frozen=True)
class Setting:
    """Stands in the `Annotated` type of a field.

    Attributes:
        help: one sentence or two, without the default.
        parse: reads the value from a text; ValueError says what to write instead.
        metavar: how a help names the value; empty for a switch.
        default: how a help tells the default, after that word; empty: the field's default; None: not at all.
        flag: its name on a command line, with hyphens; empty: the field's name.
        tgi: its flag in TGI's launcher; empty: the launcher has none.
        opposite: the flag says the opposite of the field.
    """

    help: str
    parse: Callable[[str], Any]
    metavar: str = ""
    default: str | None = ""
    flag: str = ""
    tgi: str = ""
    opposite: bool = False


@dataclass(frozen=True)
class Field:
    """A field that can be set.

    Attributes:
        name: of the field.
        kind: its type.
        value: its default.
    """

    name: str
    kind: Any
    value: Any
    setting: Setting

    @property
    def flag(self) -> str:
        return self.setting.flag or self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """Its name in a file, and as an argument of a function."""
        return self.flag.replace("-", "_")

    @property
    def default(self) -> Any:
        """The flag's."""
        return self.told(self.value)

    def told(self, value: Any) -> Any:
        """The field's value where the flag has this one."""
        return not value if self.setting.opposite else value

    @property
    def help(self) -> str:
        """With the default."""
        setting = self.setting
        if setting.default is None or not setting.metavar:
            return setting.help
        return f"{setting.help} Default{setting.default or f' {self.value}'}."


def fields_of(record: type[msgspec.Struct]) -> Iterator[Field]:
    """The fields of a record that can be set, in order."""
    for field in msgspec.structs.fields(record):
        setting = next((each for each in get_args(field.type) if isinstance(each, Setting)), None)
        if setting is not None:
            yield Field(field.name, get_args(field.type)[0], field.default, setting)
