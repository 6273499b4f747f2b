"""The description of a setting, written once beside its field: its parser, its help and its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_args

import msgspec

from inflight.errors import ConfigError

PREFIX = "INFLIGHT_"
"""The prefix of the environment variables of settings."""

R = TypeVar("R", bound=msgspec.Struct)

_SCALARS = {int, float, str, bool, int | None, float | None, str | None}
"""Types of fields whose values `check` can pass to `Setting.parse` as text."""


_SECRETS = ("dec_key", "token")


class Reticent(msgspec.Struct, frozen=True):
    """A configuration whose secrets no log shows."""

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        shown = (
            f"{name}={'...' if value is not None and name in _SECRETS else repr(value)}"
            for name, value in values.items()
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Setting:
    """The description of a setting, in the `Annotated` type of its field.

    Attributes:
        help: one sentence or two, without the default.
        parse: reads the value from a text; its ValueError says what to write instead.
        metavar: the name of the value in a help text; empty for a switch.
        default: the text after the word "Default" in a help text; empty: the field's default; None: it is not shown.
        flag: its name on a command line, with hyphens; empty: the field's name.
        tgi: its flag in TGI's launcher; empty: the launcher has none.
        opposite: the flag means the opposite of the field.
        inherited: scripts and ranks, which have no command line, read its variable too.
        secret: the value is never printed.
        many: the flag may be repeated; the field is a tuple, and `parse` reads one item of it.
    """

    help: str
    parse: Callable[[str], Any]
    metavar: str = ""
    default: str | None = ""
    flag: str = ""
    tgi: str = ""
    opposite: bool = False
    many: bool = False
    inherited: bool = False
    secret: bool = False


@dataclass(frozen=True)
class Field:
    """A field that can be set.

    Attributes:
        name: of the field.
        kind: its type.
        value: its default; None if it has none.
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
    def variable(self) -> str:
        """Its environment variable."""
        return PREFIX + self.key.upper()

    @property
    def default(self) -> Any:
        """The default of the flag."""
        return self.told(self.value)

    def told(self, value: Any) -> Any:
        """The field's value for this value of the flag."""
        if self.setting.many:
            return tuple(value)
        return not value if self.setting.opposite else value

    @property
    def help(self) -> str:
        """The help text with the default."""
        setting = self.setting
        if setting.default is None or not setting.metavar:
            return setting.help
        return f"{setting.help} Default{setting.default or f' {self.value}'}."


@lru_cache
def fields_of(record: type[msgspec.Struct]) -> tuple[Field, ...]:
    """The fields of a record that can be set, in order."""
    found = []
    for field in msgspec.structs.fields(record):
        setting = next((each for each in get_args(field.type) if isinstance(each, Setting)), None)
        if setting is not None:
            value = None if field.default is msgspec.NODEFAULT else field.default
            found.append(Field(field.name, get_args(field.type)[0], value, setting))
    return tuple(found)


def filled(record: type[R], values: Mapping[str, Any], **fields: Any) -> R:
    """A record with the settings whose keys are in `values`.

    Args:
        fields: by field name; they override `values`.
    """
    told = {each.name: each.told(values[each.key]) for each in fields_of(record) if each.key in values}
    return record(**{**told, **fields})


def check(record: msgspec.Struct) -> None:
    """Checks the settings of a record that a script has made, and of the records in it.

    Raises:
        ConfigError: a value that the setting does not accept; the text names the field and says what to write.
    """
    for name in record.__struct_fields__:
        inner = getattr(record, name)
        if isinstance(inner, msgspec.Struct):
            check(inner)
    for field in fields_of(type(record)):
        value = getattr(record, field.name)
        if field.kind not in _SCALARS or value == field.value:
            continue
        try:
            msgspec.convert(value, field.kind)
            if value is not None:
                field.setting.parse(str(value))
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(f"{type(record).__name__}.{field.name}: {error}") from None
