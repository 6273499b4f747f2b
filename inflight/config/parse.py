"""Parsers of the texts of settings, from a flag, a variable or a file.

Each takes a text and returns the value, or raises a ValueError that says what to write instead.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from inflight.errors import ConfigError

KEY_LENGTHS = (16, 24, 32)
"""Lengths of an AES key in bytes."""

TOKEN_LENGTH = 16
"""Characters that a token has at least. Who answers at an address can try tokens on what a caller has sent."""

_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off", "")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def switch(text: str) -> bool:
    lower = text.strip().lower()
    if lower in _YES:
        return True
    if lower in _NO:
        return False
    raise ValueError(f"'{text}' is neither true nor false; write true or false")


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    bounds = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"'{text}' is no whole number; write {bounds}") from None
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"{value} is out of range; write {bounds}")
        return value

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"'{text}' is no number of seconds; write for example 30 or 2.5")
    return value


def time_limit(text: str) -> float | None:
    """Seconds; 0 is no limit."""
    return seconds(text) or None


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"'{text}' is no ratio; write a number from 0")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"'{text}' is no share; write a number from 0 to 1")
    return value


def memory(text: str) -> int:
    """`512m`, `4g` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"'{text}' is no amount of memory; write 512m or 4g")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for choice in choices:
            if text.lower() == choice.lower():
                return choice
        raise ValueError(f"'{text}' is not known; write one of: {', '.join(choices)}")

    return parse


def device_ids(text: str) -> tuple[int, ...]:
    """`0,1` as a tuple; empty for an empty text."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not all(item.isdecimal() for item in items) or len(set(items)) != len(items):
        raise ValueError(f"'{text}' is no list of device ids; write distinct numbers like 0,1")
    return tuple(int(item) for item in items)


def present(text: str) -> Path:
    """The absolute path of a file that is there."""
    return Path(existing_file(text)).absolute()


def files(text: str) -> tuple[str, ...]:
    """`a.mindir,b.mindir` as absolute paths."""
    found = tuple(item.strip() for item in text.split(","))
    if not all(found):
        raise ValueError(f"'{text}' names no files; write one file, or several with commas")
    return tuple(str(Path(item).absolute()) for item in found)


def existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(f"the file '{text}' does not exist; give the path of a file")
    return text


def versions(text: str) -> str:
    """`all`, `latest`, `latest:2`, or numbers like `1,3`."""
    given = text.strip().lower()
    if not re.fullmatch(r"all|latest(:[1-9][0-9]{0,5})?|[1-9][0-9]{0,17}(,[1-9][0-9]{0,17})*", given):
        raise ValueError(f"'{text}' names no versions; write all, latest:2 or numbers like 1,3")
    return given


def folder(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise ValueError(f"the folder '{text}' does not exist; give the path of a folder")
    return path


def absolute(text: str) -> Path:
    return Path(text).absolute()


def domains(text: str) -> tuple[str, ...]:
    """`a.example,b.example` as a tuple of host names in lower case."""
    names = tuple(item.strip().lower() for item in text.split(",") if item.strip())
    bad = next((name for name in names if "/" in name or ":" in name or " " in name), None)
    if bad is not None:
        raise ValueError(f"'{bad}' is no host; write names without scheme, port and path, like images.example")
    return names


def class_name(text: str) -> str:
    """`package.module:Class`."""
    module, _, name = text.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"'{text}' names no class; write module:Class")
    return text


def address(text: str) -> str:
    """`ip:port`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"'{text}' is no address; write ip:port, as 10.0.0.5:7000")
    return text


def local(where: str) -> bool:
    """Whether only processes of this machine reach an address `ip:port`."""
    host = where.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token(text: str) -> str:
    """A text that nobody guesses; the error does not repeat it."""
    if len(text) < TOKEN_LENGTH:
        raise ValueError(
            f"the token has {len(text)} characters and needs {TOKEN_LENGTH}; make one with: openssl rand -hex 32"
        )
    return text


def cluster(text: str) -> str:
    """`ray`, `ray:auto` or `ray:10.0.0.5:6379`; the first two are the same."""
    kind, _, where = text.strip().partition(":")
    if kind.lower() == "auto" and not where:
        kind, where = "ray", "auto"
    if kind.lower() != "ray":
        raise ValueError(f"'{text}' is no cluster; write ray, or ray:HOST:6379 with the address of Ray's head")
    return "ray:auto" if where in ("", "auto") else f"ray:{address(where)}"


_RAYS = {"cpu": "CPU", "gpu": "GPU"}


def resources(text: str) -> tuple[tuple[str, float], ...]:
    """`cpu=8,gpu=1,memory=16g,TPU=4` as pairs with Ray's names."""
    found: dict[str, float] = {}
    for item in (each.strip() for each in text.split(",")):
        if not item:
            continue
        name, _, given = item.partition("=")
        name = _RAYS.get(name.strip().lower(), name.strip())
        try:
            value = float(memory(given)) if name == "memory" else ratio(given)
        except ValueError:
            name = ""
        if not name or name in found:
            raise ValueError(f"'{item}' is no resource; write pairs like cpu=8,gpu=1,memory=16g, each name once")
        found[name] = value
    return tuple(found.items())


def resources_of(given: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    """`{"cpu": 8, "memory": 16 << 30}` as pairs with Ray's names.

    Raises:
        ConfigError: it is no mapping of names to numbers.
    """
    if given is None:
        return ()
    right = isinstance(given, Mapping) and all(
        isinstance(name, str) and type(value) in (int, float) and 0 <= value < float("inf")
        for name, value in given.items()
    )
    if not right:
        raise ConfigError(f"cluster_resources: {given!r} names no resources; write for example {{'cpu': 8, 'gpu': 1}}")
    return tuple((_RAYS.get(name.lower(), name), float(value)) for name, value in given.items())


def key_file(text: str) -> bytes:
    """The key in a file: 16, 24 or 32 bytes; a line end may follow it."""
    content = Path(existing_file(text)).read_bytes()
    for key in (content, content.rstrip(b"\r\n")):
        if len(key) in KEY_LENGTHS:
            return key
    raise ValueError(f"'{text}' holds {len(content)} bytes; a key has 16, 24 or 32")
