"""The file of API keys: YAML, TOML or JSON, by its ending, with a list `keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from inflight.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1)]

_ENDINGS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key.

    Attributes:
        name: of its holder, for logs and metrics.
        key: what the holder shows.
        tenant: only holders with the same tenant share cached prompts; None: the holder's name.
        priority: of its requests to language models; larger goes first.
        models: names of the models and servables that it may call; None: all.
        requests_per_minute, tokens_per_minute: averages, of which a minute's worth may come at once; tokens of prompts
            and answers together.
        concurrent: requests at a time.
        admin: it may load and unload models, where the server lets callers do so.
        enabled: False: the key is known and refused.
    """

    name: Annotated[str, msgspec.Meta(min_length=1)]
    key: Annotated[str, msgspec.Meta(min_length=1)]
    tenant: str | None = None
    priority: int = 0
    models: list[str] | None = None
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    concurrent: Positive | None = None
    admin: bool = False
    enabled: bool = True

    def __repr__(self) -> str:
        """Without the key, so that no log can show it."""
        return f"KeyConfig({self.name!r})"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[KeyConfig]


def read_keys(path: Path) -> tuple[KeyConfig, ...]:
    """The keys in a file.

    Raises:
        ConfigError: the file cannot be read or has another form, or two keys have the same name or are the same. The
            text holds nothing of the file's, since what is wrong may be a key.
    """
    kind = _ENDINGS.get(path.suffix.lower(), "JSON")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the file of API keys {path}: {error.strerror}") from None
    try:
        if kind == "YAML":
            keys = msgspec.yaml.decode(data, type=_File).keys
        elif kind == "TOML":
            keys = msgspec.toml.decode(data, type=_File).keys
        else:
            keys = msgspec.json.decode(data, type=_File).keys
    except msgspec.ValidationError as error:
        raise ConfigError(f"the file of API keys {path}: {error}; write keys: [{{name: ..., key: ...}}]") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        mark: Any = getattr(error.__cause__, "problem_mark", None)
        where = f", see line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"the file of API keys {path} is not valid {kind}{where}") from None
    for field in ("name", "key"):
        if len({getattr(each, field) for each in keys}) < len(keys):
            raise ConfigError(f"the file of API keys {path}: two keys have the same `{field}`")
    return tuple(keys)
