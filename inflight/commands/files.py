"""Configuration files: YAML, TOML or JSON, chosen by the file's ending."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inflight.startup import one_line

_ENDINGS = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}


class FileError(Exception):
    """The file cannot be read; the text names it and says why."""


def load(path: Path) -> dict[str, Any]:
    """The table in a file.

    In YAML only true, false and null are more than text: `off`, `1_000` and `1:30` stay as they are written.

    Raises:
        FileError: the file is missing, not of the format that its ending names, not a table, or has a key twice.
    """
    kind = _ENDINGS.get(path.suffix.lower(), "JSON")
    try:
        text = path.read_text()
        loaded = {"YAML": _read_yaml, "TOML": _read_toml, "JSON": _read_json}[kind](text)
    except OSError as error:
        raise FileError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except ValueError as error:
        known = kind if path.suffix.lower() in _ENDINGS else f"{kind} (name other kinds *.yaml or *.toml)"
        raise FileError(f"{path} is not valid {known}: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise FileError(f'{path} should hold one object, like {{"http": "127.0.0.1:8080"}}')
    return loaded


def dump(table: dict[str, Any]) -> str:
    """The table as YAML that `load` reads back unchanged."""
    import yaml

    text: str = yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=120)
    return text


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if str(key) in table:
            raise ValueError(f"the key '{key}' is written twice")
        table[str(key)] = value
    return table


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        import tomli as toml
    return toml.loads(text)


def _read_yaml(text: str) -> Any:
    import yaml  # here, because it takes some 15 ms and few servers have such a file

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        return _unique(loader.construct_pairs(node, deep=True))

    loader: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), "tTfF")
    loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(null|Null|NULL|~|)$"), ["n", "N", "~", ""])
    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
