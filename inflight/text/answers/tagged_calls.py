"""Calls whose arguments stand between tags or in a notation of their own: they are written again as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

from inflight.text.answers.json_calls import CallParser
from inflight.text.answers.reader import Reader, Wait

_NAME = re.compile(r"[^\s<>{}\[\]\"]{1,256}")


class _Object:
    """Writes the JSON object of a call's arguments."""

    def __init__(self, reader: Reader, name: str) -> None:
        self._reader = reader
        self._schemas = reader.schema(name)
        self._count = 0

    def value(self, key: str, ends: list[str], string: bool = False) -> Generator[None, None, str | None]:
        """Reads the value of one argument up to one of the ends. A string goes on as it comes."""
        reader = self._reader
        reader.argue(("{" if not self._count else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._count += 1
        types = types_of(self._schemas.get(key))
        if string or not types or types == ["string"]:
            reader.argue('"')
            found = yield from reader.upto(ends, lambda text: reader.argue(escaped(reader.clean(text))))
            reader.argue('"')
            return found
        text, found = yield from reader.into(ends)
        reader.argue(json.dumps(typed(text, types), ensure_ascii=False))
        return found

    def close(self) -> None:
        self._reader.argue("}" if self._count else "{}")


def types_of(schema: Any) -> list[str]:
    """The types that a parameter's schema names."""
    if not isinstance(schema, dict):
        return []
    given = schema.get("type")
    types = [given] if isinstance(given, str) else [one for one in given or [] if isinstance(one, str)]
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or []:
            types += types_of(choice)
    if schema.get("nullable"):
        types.append("null")
    return list(dict.fromkeys(types))


def typed(text: str, types: list[str]) -> Any:
    """A value that was written as text; one that is of none of the types stays a text."""
    bare = text.strip()
    for kind in types:
        if kind == "boolean" and bare.lower() in ("true", "false", "1", "0"):
            return bare.lower() in ("true", "1")
        if kind == "null" and bare in ("null", "None"):
            return None
        if kind in ("integer", "number", "object", "array"):
            value = _parsed(bare)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if kind == "integer" and number and value == int(value):
                return int(value)
            if (kind == "number" and number) or isinstance(value, {"object": dict, "array": list}.get(kind, ())):
                return value
    return text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None


def _no_number(text: str) -> Any:
    raise ValueError(text)


def escaped(text: str) -> str:
    """A piece of a text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def functions(end: str = "</tool_call>", begun: bool = False) -> CallParser:
    """Qwen3-Coder: `<function=NAME><parameter=KEY>VALUE</parameter></function>`; a newline around VALUE is not its own.

    Args:
        end: the mark behind the function.
    """

    def parse(reader: Reader) -> Generator[None, None, bool]:
        if not begun and (yield from reader.starts("<function=")) is None:
            return False
        head = yield from reader.head([">"])
        if head is None:
            reader.buffer = "<function=" + reader.buffer
            return False
        name = head[0].strip().strip('"')
        reader.begin(name)
        yield from _parameters(reader, name, "<parameter=", "</parameter>", "</function>")
        yield from reader.starts(reader.mark(end))
        return True

    return parse


def _parameters(reader: Reader, name: str, begin: str, end: str, last: str) -> Wait:
    made = _Object(reader, name)
    while (yield from reader.starts(begin)) is not None:
        head = yield from reader.head([">"])
        if head is None:
            break
        key = re.sub(r'^\s*(?:name\s*=\s*)?"?|"?(?:\s+string="\w+")?\s*$', "", head[0])
        yield from _newline(reader)
        string = 'string="true"' in head[0]
        yield from made.value(key, ["\n" + end, end], string)
    made.close()
    yield from reader.starts(last)


def _newline(reader: Reader) -> Wait:
    while not reader.buffer and not reader.ended:
        yield
    reader.buffer = reader.buffer.removeprefix("\n")


def invocations(prefix: str, last: str) -> CallParser:
    """MiniMax and DeepSeek V3.2: `<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>`, repeated.

    Args:
        prefix: stands before the names of the tags.
        last: the mark behind the calls.
    """

    def parse(reader: Reader) -> Generator[None, None, bool]:
        found = False
        while (yield from reader.starts(f"<{prefix}invoke name=")) is not None:
            head = yield from reader.head([">"])
            if head is None:
                break
            name = head[0].strip().strip('"')
            reader.begin(name)
            found = True
            end = f"</{prefix}parameter>"
            yield from _parameters(reader, name, f"<{prefix}parameter ", end, f"</{prefix}invoke>")
        yield from reader.starts(reader.mark(last))
        return found

    return parse


def glm(reader: Reader) -> Generator[None, None, bool]:
    """`NAME<arg_key>K</arg_key><arg_value>V</arg_value></tool_call>`, with line ends between them or without."""
    key, value, last = map(reader.mark, ("<arg_key>", "<arg_value>", "</tool_call>"))
    key_end, value_end = map(reader.mark, ("</arg_key>", "</arg_value>"))
    yield from reader.white()
    head = yield from reader.head(["\n", key, last])
    if head is None or _NAME.fullmatch(head[0].strip()) is None:
        if head is not None:
            reader.buffer = "".join(head) + reader.buffer
        return False
    reader.begin(head[0])
    made = _Object(reader, head[0])
    found: str | None = head[1]
    if found == "\n":
        found = yield from reader.starts(key, last)
    while found == key:
        name, _ = yield from reader.into([key_end])
        if (yield from reader.starts(value)) is None:
            break
        yield from made.value(name.strip(), [value_end])
        found = yield from reader.starts(key, last)
    made.close()
    return True


def braces(quote: str, end: str) -> CallParser:
    """Gemma: `call:NAME{key:<quote>text<quote>,n:3,o:{a:[1,2]}}` and the mark behind it."""

    def parse(reader: Reader) -> Generator[None, None, bool]:
        if (yield from reader.starts("call:")) is None:
            return False
        head = yield from reader.head(["{"])
        if head is None or _NAME.fullmatch(head[0].strip()) is None:
            reader.buffer = "call:" + ("".join(head) if head is not None else "") + reader.buffer
            return False
        reader.begin(head[0])
        yield from _loose_object(reader, reader.mark(quote))
        yield from reader.starts(reader.mark(end))
        return True

    return parse


def _loose_object(reader: Reader, quote: str) -> Wait:
    """Reads an object whose first brace was read, with bare keys and marks around texts."""
    reader.argue("{")
    nested = ["{"]
    word: list[str] = []
    while nested:
        found = yield from reader.upto([quote, '"', "{", "}", "[", "]", ",", ":"], word.append)
        bare = "".join(word).strip()
        word.clear()
        if bare:
            reader.argue(json.dumps(bare) if found == ":" or not _is_json(bare) else bare)
        if found is None:
            break
        if found in (quote, '"'):
            reader.argue('"')
            yield from reader.upto([found], lambda text: reader.argue(escaped(reader.clean(text))))
            reader.argue('"')
            continue
        if found in "{[":
            nested.append(found)
        elif found in "}]":
            nested.pop()
        reader.argue(found + (" " if found in ",:" else ""))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_number)
    except ValueError:
        return False
    return True
