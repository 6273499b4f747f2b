"""Finds the method that a URL names, by MindSpore Serving's rules: nothing is percent-decoded, the query string is part
of the method's name, and the parts may come in another order than the documented one."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from inflight.contract import NEWEST
from inflight.errors import InvalidRequest

VERSION_LIMIT = 2**32 - 1

_DOCUMENTED = re.compile(rb"/model/([^/:]+)(?:/version/([^/:]*))?:(.+)", re.DOTALL)
_LEADING_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)")
_HELP = "the form is /model/<servable>[/version/<number>]:<method>"


class Target(NamedTuple):
    """The method that a request calls; version 0 is the newest."""

    servable: str
    version: int
    method: str


@lru_cache(maxsize=1024)
def parse_url(url: bytes) -> Target:
    """Reads `/model/<servable>[/version/<n>]:<method>`.

    A URL of another form is scanned as MindSpore Serving scans every URL: the servable follows the first `model`,
    the version the first `version` wherever that is, the method the first `:`. The documented form is tried first, so a
    servable or method may have `version` in its name.

    Args:
        url: path and query as the client sent them.

    Raises:
        InvalidRequest: a part is missing, or the version is not a number or out of range.
    """
    documented = _DOCUMENTED.fullmatch(url)
    if documented is not None:
        servable, version, method = documented.groups()
        return Target(_text(servable), NEWEST if version is None else _version(_text(version)), _text(method))
    servable = _part_after(url, b"model")
    if not servable:
        raise InvalidRequest(f"please check url, the keyword:[model] must contain. {_HELP}")
    number = _version(_text(_part_after(url, b"version"))) if b"version" in url else NEWEST
    method = url.partition(b":")[2]
    if not method:
        raise InvalidRequest(f"please check url, the keyword:[service method] must contain. {_HELP}")
    return Target(_text(servable), number, _text(method))


def parse_encoded(url: bytes) -> Target:
    """As `parse_url`, for clients that percent-encode names: each part is decoded once.

    Raises:
        InvalidRequest: as `parse_url`.
    """
    target = parse_url(url if b":" in url else unquote_to_bytes(url))
    return Target(unquote(target.servable), target.version, unquote(target.method)) if b":" in url else target


def _part_after(url: bytes, key: bytes) -> bytes:
    """The text after `key` and one more character, up to the next `/` or `:`."""
    start = url.find(key)
    if start < 0:
        return b""
    rest = url[start + len(key) + 1 :]
    ends = [end for end in (rest.find(b"/"), rest.find(b":")) if end >= 0]
    return rest[: min(ends)] if ends else rest


def _version(text: str) -> int:
    """The number that `text` begins with, as C's `strtol` reads it."""
    number = _LEADING_NUMBER.match(text)
    if number is None:
        raise InvalidRequest(
            f"please check url, the keyword:[version] value invalid, request version number {text}; {_HELP}"
        )
    digits = number.group(1)
    # int() itself refuses numbers of more than 4300 digits.
    value = int(digits) if len(digits) <= 4000 else VERSION_LIMIT
    if not 0 <= value < VERSION_LIMIT:
        raise InvalidRequest(
            f"please check url, version number range failed, request version number {text}; "
            f"it must be 0 (the newest) to {VERSION_LIMIT - 1}"
        )
    return value


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
