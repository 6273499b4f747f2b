"""What is written once of a setting, beside its field: how a command line, a file and a script may say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_args

import msgspec

from inflight.errors import ConfigError

PREFIX = "INFLIGHT_"
"""What environment variables of settings begin with."""

R = TypeVar("R", bound=msgspec.Struct)

_SCALARS = {int, float, str, bool, int | None, float | None, str | None}
"""Types of fields whose values have a text that `Setting.parse` reads."""


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
        inherited: its variable counts in scripts and in ranks too, which read no command line.
        many: a flag that may be repeated; the field is a tuple, and `parse` reads one item of it.
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


@dataclass(frozen=True)
class Field:
    """A field that can be set.

    Attributes:
        name: of the field.
        kind: its type.
        value: its default; None where it has none.
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
        """The environment variable that says it."""
        return PREFIX + self.key.upper()

    @property
    def default(self) -> Any:
        """The flag's."""
        return self.told(self.value)

    def told(self, value: Any) -> Any:
        """The field's value where the flag has this one."""
        if self.setting.many:
            return tuple(value)
        return not value if self.setting.opposite else value

    @property
    def help(self) -> str:
        """With the default."""
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
    """A record with the settings that are among some values by their keys.

    Args:
        fields: by their own names; they go before the values.
    """
    told = {each.name: each.told(values[each.key]) for each in fields_of(record) if each.key in values}
    return record(**{**told, **fields})


def check(record: msgspec.Struct) -> None:
    """Checks the settings of a record that a script has made, and of the records in it.

    Raises:
        ConfigError: a value that no flag could have; the text names the field and says what to write.
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
