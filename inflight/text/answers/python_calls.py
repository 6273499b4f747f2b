"""Calls that are written as Python calls: `[f(a="x", b=1), g()]`. They are written again as JSON, one at a time."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator
from typing import Any

from inflight.text.answers.json_calls import CallParser, json_call
from inflight.text.answers.reader import MAX_HEAD, Reader

_NAME = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(")
_BEGUN = re.compile(r"\s*(?:[A-Za-z_][\w.-]*)?\s*")
_TURNS = re.compile(r"""["'\\()\[\]{}]""")
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def listed(*ends: str, sure: bool = True) -> CallParser:
    """`[f(a="x"), g()]`, or a JSON object of a call, and one of the marks behind it.

    Args:
        sure: also functions that the request does not name; what a mark does not tell from text is no such call.
    """

    def parse(reader: Reader) -> Generator[None, None, bool]:
        yield from reader.white()
        if reader.buffer.startswith("{"):
            found = yield from json_call(reader)
        else:
            found = yield from _calls(reader, "[", "]", sure)
        if found and ends:
            yield from reader.starts(*map(reader.mark, ends))
        return found

    return parse


def lines(reader: Reader) -> Generator[None, None, bool]:
    """Olmo 3: a call a line, and `</function_calls>`."""
    found = yield from _calls(reader, "", "", True)
    yield from reader.starts(reader.mark("</function_calls>"))
    return found


def _calls(reader: Reader, bracket: str, close: str, sure: bool) -> Generator[None, None, bool]:
    """Calls with commas or white space between them, in a bracket. False, and nothing is read: it is another text."""
    found = False
    while True:
        yield from reader.white()
        begin = bracket if not found else ""
        name = yield from _name(reader, begin, sure or found)
        if name is None:
            return found
        arguments = yield from _arguments(reader)
        reader.begin(name)
        reader.argue(json.dumps(_values(arguments), ensure_ascii=False))
        found = True
        mark = yield from reader.starts(*filter(None, (",", close)))
        if mark == close and close:
            return True


def _name(reader: Reader, begin: str, sure: bool) -> Generator[None, None, str | None]:
    """Reads the name of a function and its parenthesis; one that is not `sure` to be a call must be of a known one."""
    while True:
        text = reader.buffer
        if begin.startswith(text[: len(begin)]):
            match = _NAME.match(text, len(begin))
            if match is not None:
                if not sure and not reader.knows(match[1]):
                    return None
                reader.buffer = text[match.end() :]
                return match[1]
            begun = _BEGUN.match(text, len(begin)) if len(text) >= len(begin) else None
            if begun is not None and begun.end() < len(text):
                return None
        else:
            return None
        if reader.ended or len(text) > MAX_HEAD:
            return None
        yield


def _arguments(reader: Reader) -> Generator[None, None, str]:
    """Reads the text up to the parenthesis that closes the call."""
    at, depth, quote = 0, 1, ""
    while True:
        while (found := _TURNS.search(reader.buffer, at)) is not None:
            char, at = found[0], found.end()
            if char == "\\":
                at += 1
            elif quote:
                quote = "" if char == quote else quote
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
            else:
                depth -= 1
                if not depth:
                    text, reader.buffer = reader.buffer[: at - 1], reader.buffer[at:]
                    return reader.clean(text)
        at = max(at, len(reader.buffer))
        if reader.ended:
            text, reader.buffer = reader.buffer, ""
            return reader.clean(text)
        yield


def _values(arguments: str) -> dict[str, Any]:
    """The arguments of a call by name. What is no literal stays the text that was written."""
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    if not isinstance(call, ast.Call):
        return {}
    return {one.arg: _value(one.value) for one in call.keywords if one.arg is not None}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name):
        return _CONSTANTS.get(node.id.lower(), node.id)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_value(key)): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _value(node.operand)
        if isinstance(inner, (int, float)):
            return -inner if isinstance(node.op, ast.USub) else inner
    return ast.unparse(node)
