"""The grammar of calls in a form that only a checkpoint's `response_template` declares, made of its marks and patterns.

What is written is what `answers/declared.py` reads. Patterns that are more than texts around a name say nothing of how
a call is written; of such a template no call can be forced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from inflight.text.function import Function
from inflight.text.schema import part_of
from inflight.text.written import Rules, text_of, text_value

_SPACES = re.compile(r"\\[sn][*?]\??| [*?]\??")
_GROUP = re.compile(r"\(\?P<(\w+)>(?:[^()\\]|\\.)*\)")
_LITERAL = re.compile(r"\\([^\w])|\\n|\\s\+?|([^\\()\[\].*+?{}|^$])")

Parts = list[str | tuple[str]]
"""Texts, and the names of groups."""


class DeclaredCalls(NamedTuple):
    """How a template writes calls.

    Attributes:
        begin, end: the texts around a call, or around a list of calls.
        call: the rule of one call.
        between: the text between calls of a list; None: each call has its own `begin` and `end`.
    """

    begin: str
    end: str
    call: Callable[[Rules, Function], str]
    between: str | None


@lru_cache(16)
def declared_calls(template: str) -> DeclaredCalls | None:
    """How the calls of a `response_template` (the text of a JSON object) are written; None: it does not tell."""
    try:
        field = json.loads(template)["fields"]["tool_calls"]
        head = _head(field)
        end = _first(field.get("close")) or _text(_parts(field.get("close_pattern") or ""))
        named = _named(field)
        if head is None or not end or named is None or not isinstance(head[0], str):
            return None
        begin, rest = head[0], head[1:]
        body = _body(field, named)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    if body is None or (any(isinstance(part, tuple) for part in rest) != (named.captured is not None)):
        return None

    def call(rules: Rules, function: Function) -> str:
        name = "".join(function.name if isinstance(part, tuple) else part for part in rest)
        return f"{text_of(name)} {body(rules, function)}"

    if not field.get("transform_each"):
        return DeclaredCalls(begin, end, call, None)
    return DeclaredCalls(f"{begin}[", f"]{end}", call, ", ")


class _Named(NamedTuple):
    """Where a template has the name and the arguments of a call.

    Attributes:
        captured: the group of the opening pattern with the name; None: the name is in the content.
        name, arguments: keys of the content, an object; of a captured name `arguments` is empty: the content is they.
    """

    captured: str | None
    name: str = "name"
    arguments: str = "arguments"


def _named(field: Mapping[str, Any]) -> _Named | None:
    transform, each = field.get("transform"), bool(field.get("transform_each"))
    if transform is None:
        return _Named(None)
    function = transform.get("function", transform)
    name = re.fullmatch(r"\{(content\.)?(\w+)\}", function["name"])
    given = function.get("arguments", function.get("parameters"))
    arguments = re.fullmatch(r"\{(content\.)?(\w+)\}", given) if isinstance(given, str) else None
    if name is None or arguments is None:
        return None
    if each or (name[1] and arguments[1]):
        return _Named(None, name[2], arguments[2])
    whole = not name[1] and not arguments[1] and arguments[2] == "content"
    return _Named(name[2], "", "") if whole else None


def _body(field: Mapping[str, Any], named: _Named) -> Callable[[Rules, Function], str] | None:
    kind, given = field.get("content", "text"), field.get("content_args") or {}
    if kind == "json":
        return _arguments if named.captured is not None else _object(named.name, named.arguments)
    if named.captured is None or (given.get("value_parser") or {"name": "raw"}).get("name") not in ("raw", "text"):
        return None
    if kind == "kv-lines":
        return _listed(("",), (given.get("kv_sep", ":"),), given.get("line_sep", "\n"))
    if kind != "xml-inline":
        return None
    parts = _parts(given["tag_pattern"])
    if parts is None or [part for part in parts if isinstance(part, tuple)] != [("key",), ("value",)]:
        return None
    at, to = parts.index(("key",)), parts.index(("value",))
    behind = _text(parts[to + 1 :])
    return _listed(parts[:at], parts[at + 1 : to], behind) if behind else None


def _arguments(rules: Rules, function: Function) -> str:
    return rules.json(function.parameters, function.strict)


def _object(name: str, arguments: str) -> Callable[[Rules, Function], str]:
    def body(rules: Rules, function: Function) -> str:
        head = f"{{{json.dumps(name)}: {json.dumps(function.name)}, {json.dumps(arguments)}: "
        return f"{text_of(head)} {_arguments(rules, function)} {text_of('}')}"

    return body


def _listed(
    before: Sequence[str | tuple[str]], middle: Sequence[str | tuple[str]], behind: str
) -> Callable[[Rules, Function], str]:
    """Each argument with its name between two texts; strings as they are, everything else as JSON."""

    def body(rules: Rules, function: Function) -> str:
        schema = function.parameters
        listed, required = schema.get("properties"), schema.get("required") or ()
        parts = []
        for key, one in (listed if isinstance(listed, dict) else {}).items():
            head = text_of("".join(map(str, before)) + key + "".join(map(str, middle)))
            inner = part_of(schema, one)
            kind = inner.get("type") if isinstance(inner, dict) else None
            if kind == "string" or (isinstance(kind, list) and "string" in kind):
                value = text_value(rules, inner, function.strict, behind)
            else:
                value = f"{rules.json(inner, function.strict)} {text_of(behind)}"
            part = rules.rule(f"{head} {value}")
            parts.append(part if key in required else f"{part}?")
        return " ".join(parts)

    return body


def _head(field: Mapping[str, Any]) -> Parts | None:
    """What stands before a call's content, or before the list of calls."""
    opened = _first(field.get("open"))
    return [opened] if opened else _parts(field.get("open_pattern") or "")


def _first(given: Any) -> str:
    """The first of the texts; `eos` is none, but the end of the answer."""
    texts = [given] if isinstance(given, str) else given or []
    return next((str(text) for text in texts if text != "eos"), "")


def _text(parts: Parts | None) -> str:
    return "".join(map(str, parts)) if parts and all(isinstance(part, str) for part in parts) else ""


def _parts(pattern: str) -> Parts | None:
    """The texts and named groups of a pattern; white space that may be missing is left out. None: it has more."""
    found: Parts = []
    at = 0
    while at < len(pattern):
        spaces, group = _SPACES.match(pattern, at), _GROUP.match(pattern, at)
        if spaces is not None:
            at = spaces.end()
            continue
        if group is not None:
            found.append((group[1],))
            at = group.end()
            continue
        literal = _LITERAL.match(pattern, at)
        if literal is None or pattern[literal.end() : literal.end() + 1] in ("*", "?", "{", "+"):
            return None
        text = literal[1] or literal[2] or ("\n" if literal[0] == "\\n" else " ")
        if found and isinstance(found[-1], str):
            found[-1] += text
        else:
            found.append(text)
        at = literal.end()
    return found
