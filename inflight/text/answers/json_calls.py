"""Calls whose arguments the model writes as JSON: they go through as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator

from inflight.text.answers.reader import MAX_HEAD, Reader, Wait

CallParser = Callable[[Reader], Generator[None, None, bool]]

_BEFORE = r'(?:"(?:type|id|tool_call_id)"\s*:\s*"[^"]*"\s*,\s*)?'
_HEAD = re.compile(
    r"\{\s*" + _BEFORE + r'"(?:name|tool_name)"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_NAMED = re.compile(r'\{\s*"((?:[^"\\]|\\.)+)"\s*:\s*(?=\S)')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_TURNS = re.compile(r'["\\{}\[\],\ud800-\udfff]')
_DECODER = json.JSONDecoder()


def json_call(reader: Reader) -> Generator[None, None, bool]:
    """Reads an object with a function's name and its arguments; False, and nothing is read: it is another text."""
    while True:
        text = reader.buffer
        head = _HEAD.match(text)
        if head is not None:
            reader.begin(json.loads(f'"{head[1]}"', strict=False))
            reader.buffer = text[head.end() :]
            yield from json_value(reader)
            yield from _rest_of_object(reader)
            return True
        if text.startswith("{"):
            try:
                whole, end = _DECODER.raw_decode(text)
            except ValueError:
                if reader.ended or len(text) > MAX_HEAD:
                    return False
            else:
                name = whole.get("name", whole.get("tool_name"))
                if not isinstance(name, str):
                    return False
                reader.begin(name)
                given = whole.get("arguments", whole.get("parameters", {}))
                reader.argue(_object_text(json.dumps(given, ensure_ascii=False)))
                reader.buffer = text[end:]
                return True
        elif text or reader.ended:
            return False
        yield


def keyed_call(reader: Reader) -> Generator[None, None, bool]:
    """Reads an object whose one key is the function's name, and its value the arguments; as `json_call`."""
    while True:
        head = _NAMED.match(reader.buffer)
        if head is not None:
            reader.begin(json.loads(f'"{head[1]}"', strict=False))
            reader.buffer = reader.buffer[head.end() :]
            yield from json_value(reader)
            yield from _rest_of_object(reader)
            return True
        other = reader.buffer and not reader.buffer.startswith("{")
        if other or reader.ended or len(reader.buffer) > MAX_HEAD:
            return False
        yield


def json_value(reader: Reader) -> Wait:
    """Reads one JSON value, the arguments of the call that has begun; an object within a JSON string is taken out."""
    while not reader.buffer.lstrip() and not reader.ended:
        yield
    reader.buffer = reader.buffer.lstrip()
    if reader.buffer.startswith('"'):
        while (found := _STRING.match(reader.buffer)) is None and not reader.ended:
            yield
        text = found[0] if found is not None else reader.buffer
        reader.buffer = reader.buffer[len(text) :]
        reader.argue(_object_text(text))
        return
    scan = Scan()
    while True:
        end = scan.end(reader.buffer)
        text = reader.buffer if end is None else reader.buffer[:end]
        reader.buffer = reader.buffer[len(text) :]
        reader.argue(text)
        if end is not None or reader.ended:
            return
        yield


def _object_text(text: str) -> str:
    """The JSON of arguments; models write it as a JSON string sometimes."""
    if text.startswith('"'):
        try:
            inner = json.loads(text)
            if isinstance(json.loads(inner), dict):
                return str(inner)
        except (ValueError, TypeError):
            pass
    return text


def _rest_of_object(reader: Reader) -> Wait:
    scan = Scan(depth=1)
    while True:
        end = scan.end(reader.buffer)
        reader.buffer = "" if end is None else reader.buffer[end:]
        if end is not None or reader.ended:
            return
        yield


class Scan:
    """Finds the end of a JSON value that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """The index in the next piece at which the value ends; None: it goes on. A mark outside of a string ends it."""
        at = 0
        if self._escaped and text:
            self._escaped, at = False, 1
        while (found := _TURNS.search(text, at)) is not None:
            char, at = found[0], found.end()
            if char >= "\ud800" and char <= "\udfff":
                if not self._quoted:
                    return at - 1
            elif self._quoted:
                if char == "\\":
                    self._escaped = at >= len(text)
                    at += 1
                elif char == '"':
                    self._quoted = False
                    if not self._depth:
                        return at
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                if not self._depth:  # a bare value ends where its object does
                    return at - 1
                self._depth -= 1
                if not self._depth:
                    return at
            elif char == "," and not self._depth:
                return at - 1
        return None


# Forms. Each parser is called behind the mark that begins calls; False: it was no call, and nothing was read.


def hermes(reader: Reader) -> Generator[None, None, bool]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`"""
    yield from reader.white()
    if not (yield from json_call(reader)):
        return False
    yield from reader.starts(reader.mark("</tool_call>"))
    return True


def listed(*ends: str, call: CallParser = json_call) -> CallParser:
    """`[{"name": ..., "arguments": {...}}, ...]`, or such objects, and one of the marks behind them.

    Args:
        call: reads an object.
    """

    def parse(reader: Reader) -> Generator[None, None, bool]:
        bracket = yield from reader.starts("[")
        found = False
        while True:
            yield from reader.white()
            if not (yield from call(reader)):
                break
            found = True
            if (yield from reader.starts(",", ";")) is None:
                yield from reader.white()
                if bracket or not reader.buffer.startswith("{"):  # without a list, one object a line
                    break
        if not found and bracket:
            reader.buffer = bracket + reader.buffer
        if found and bracket:
            yield from reader.starts("]")
        if found and ends:
            yield from reader.starts(*map(reader.mark, ends))
        return found

    return parse


def mistral(reader: Reader) -> Generator[None, None, bool]:
    """A list of calls up to v7, `NAME[ARGS]{...}` from v11 on, with `[CALL_ID]ID` before `[ARGS]` in some."""
    yield from reader.white()
    if not reader.buffer or reader.buffer[0] in "[{":
        named = reader.mark("[ARGS]")
        if not reader.buffer.startswith(named):
            return (yield from listed()(reader))
    found = yield from reader.head([reader.mark("[ARGS]"), "{"])
    if found is None:
        return False
    name, end = found
    name, _, id = name.partition(reader.mark("[CALL_ID]"))
    if end == "{":
        reader.buffer = end + reader.buffer
    reader.begin(name, id.strip() or None)
    yield from json_value(reader)
    return True


def deepseek(reader: Reader) -> Generator[None, None, bool]:
    """V3: `function<sep>NAME`, a line end and a fence; V3.1: `NAME<sep>{...}`."""
    begin, end = reader.mark("<｜tool▁call▁begin｜>"), reader.mark("<｜tool▁call▁end｜>")
    sep, last = reader.mark("<｜tool▁sep｜>"), reader.mark("<｜tool▁calls▁end｜>")
    found = False
    while (yield from reader.starts(begin)) is not None:
        head = yield from reader.head([sep])
        if head is None:
            break
        name = head[0].strip()
        if name == "function":
            head = yield from reader.head(["\n```json\n", "\n```json", "{"])
            if head is None:
                break
            name = head[0].strip()
            if head[1] == "{":
                reader.buffer = "{" + reader.buffer
        reader.begin(name)
        found = True
        yield from json_value(reader)
        yield from reader.starts("```")
        yield from reader.starts(end)
    yield from reader.starts(last)
    return found


def kimi(reader: Reader) -> Generator[None, None, bool]:
    """`functions.NAME:0<|tool_call_argument_begin|>{...}`; that id must come back."""
    begin, end = reader.mark("<|tool_call_begin|>"), reader.mark("<|tool_call_end|>")
    found = False
    while (yield from reader.starts(begin)) is not None:
        head = yield from reader.head([reader.mark("<|tool_call_argument_begin|>")])
        if head is None:
            break
        id = head[0].strip()
        reader.begin(id.removeprefix("functions.").rpartition(":")[0] or id, id)
        found = True
        yield from json_value(reader)
        yield from reader.starts(end)
    yield from reader.starts(reader.mark("<|tool_calls_section_end|>"))
    return found
