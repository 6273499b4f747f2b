"""Forms that a checkpoint declares itself: `response_template` in tokenizer_config.json, as in transformers 5.13.

Each field of a message has marks or patterns around it, a parser of its content, and a transform. Where the marks are
those of a known family, that family reads the answer. Otherwise thoughts between marks go through as they come, and
calls are read when they end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from inflight.text.answers.json_calls import CallParser
from inflight.text.answers.reader import Reader
from inflight.text.answers.tagged_calls import typed, types_of

DECLARED = "declared"
"""The name of such a form in `AnswerForm.calls` and `AnswerForm.thoughts`."""
_THOUGHTS, _CALLS = ("reasoning_content", "reasoning", "thinking"), "tool_calls"
_MARK = re.compile(r"<[^<>\s()]{1,60}>|\[/?[A-Z_]{2,40}\]")
_SPACE = re.compile(r"^(?:\\s[*+?]?)+")
_META = re.compile(r"[()\[\].*+?{}|^$]")


class Declared(NamedTuple):
    """What a template declares.

    Attributes:
        open, close: the marks around a thought; empty: it has none that are texts.
        begins: the texts with which calls begin.
        ends: the text behind a call; None: a pattern tells it.
        marks: what may be added tokens.
    """

    open: tuple[str, ...] = ()
    close: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] | None = ()
    marks: tuple[str, ...] = ()
    field: Mapping[str, Any] = {}


@lru_cache(16)
def declared(template: str) -> Declared:
    """Reads a template, the text of a JSON object. What is none declares nothing."""
    try:
        fields = json.loads(template)["fields"]
        thought: dict[str, Any] = next((fields[name] for name in _THOUGHTS if name in fields), {})
        calls = fields.get(_CALLS, {})
        open, close = _texts(thought.get("open")), _texts(thought.get("close"))
        begins = _texts(calls.get("open")) or _beginning(calls.get("open_pattern"))
        for key in ("open_pattern", "close_pattern"):
            re.compile(calls.get(key) or "")
    except (ValueError, KeyError, TypeError, AttributeError, re.error):
        return Declared()
    ends = None if calls.get("close_pattern") else _texts(calls.get("close"))
    if not (open and close and "eos" not in close):
        open = close = ()
    written = " ".join(_strings([thought, calls]))
    marks = dict.fromkeys([*open, *close, *begins, *(ends or ()), *_MARK.findall(plain(written))])
    return Declared(open, close, begins, ends, tuple(marks), calls)


def plain(pattern: str) -> str:
    """A regular expression without its escapes."""
    return re.sub(r"\\(\W)", r"\1", pattern)


def source_of(template: str, calls: bool) -> str:
    """What the calls, or the thoughts, of a template are told by, in one text."""
    try:
        fields = json.loads(template)["fields"]
        chosen = [fields[name] for name in ((_CALLS,) if calls else _THOUGHTS) if name in fields]
    except (ValueError, KeyError, TypeError):
        return ""
    return plain(" ".join(_strings(chosen)))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else []


def _texts(given: Any) -> tuple[str, ...]:
    return tuple([given] if isinstance(given, str) else given or ())


def _beginning(pattern: Any) -> tuple[str, ...]:
    """The text that every match of a pattern begins with, white space apart."""
    if not isinstance(pattern, str):
        return ()
    rest = _SPACE.sub("", pattern)
    text, at = "", 0
    while at < len(rest):
        if rest[at] == "\\" and at + 1 < len(rest) and not rest[at + 1].isalnum():
            text, at = text + rest[at + 1], at + 2
        elif rest[at] == "\\" or _META.match(rest[at]):
            break
        else:
            text, at = text + rest[at], at + 1
    if at < len(rest) and rest[at] in "*?{":  # the last letter may be missing
        text = text[:-1]
    return (text,) if text else ()


def region(form: Declared) -> CallParser:
    """Reads a call behind the text that begins it, when it has ended."""

    def parse(reader: Reader) -> Generator[None, None, bool]:
        begun = form.begins[0]
        if form.ends is None:
            pattern = re.compile(form.field["close_pattern"], re.DOTALL)
            while (found := pattern.search(reader.spelled(reader.buffer))) is None and not reader.ended:
                yield
            whole = reader.spelled(reader.buffer)
            body, rest = (whole[: found.start()], whole[found.end() :]) if found is not None else (whole, "")
            close = whole[len(body) : len(whole) - len(rest)]
        else:
            parts: list[str] = []
            mark = yield from reader.upto(list(map(reader.mark, form.ends)), parts.append)
            body, rest, close = reader.spelled("".join(parts)), reader.buffer, mark or ""
        try:
            calls = _calls(form.field, begun + body)
        except (ValueError, KeyError, TypeError, IndexError):
            reader.buffer = body + close + rest
            return False
        reader.buffer = rest
        for name, arguments in calls:
            reader.begin(name)
            schemas = reader.schema(name)
            if isinstance(arguments, dict):
                arguments = {key: _typed(value, schemas.get(key)) for key, value in arguments.items()}
            reader.argue(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        return True

    return parse


def _typed(value: Any, schema: Any) -> Any:
    types = types_of(schema)
    return typed(value, types) if isinstance(value, str) and types and "string" not in types else value


def _calls(field: Mapping[str, Any], text: str) -> list[tuple[str, Any]]:
    """The names and arguments of the calls in a region.

    Raises:
        ValueError, KeyError, TypeError: it is not of this form.
    """
    captures: dict[str, Any] = {}
    pattern = field.get("open_pattern")
    if pattern:
        found = re.compile(pattern, re.DOTALL).match(text)
        if found is None:
            raise ValueError("it does not begin as a call")
        captures, body = found.groupdict(), text[found.end() :]
    else:
        body = text[max(len(one) for one in _texts(field.get("open")) if text.startswith(one)) :]
    value = _content(body, field.get("content", "text"), field.get("content_args") or {})
    transform = field.get("transform")
    if field.get("transform_each"):
        value = [_transformed(transform, {**captures, **one}) for one in value]
    elif transform is not None:
        value = _transformed(transform, {**captures, "content": value})
    calls = []
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function", one)
        if not isinstance(function["name"], str):
            raise ValueError("it has no name")
        calls.append((function["name"], function.get("arguments", function.get("parameters", {}))))
    return calls


def _transformed(transform: Any, scope: Mapping[str, Any]) -> Any:
    if isinstance(transform, Mapping):
        return {key: _transformed(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [_transformed(value, scope) for value in transform]
    found = re.fullmatch(r"\{(\w+(?:\.\w+)*)\}", transform) if isinstance(transform, str) else None
    if found is None:
        return transform
    value: Any = scope
    for key in found[1].split("."):
        value = value[key]
    return value


def _content(text: str, kind: str, given: Mapping[str, Any]) -> Any:
    """A region's content by the names of transformers' parsers."""
    if kind == "json":
        return _json(text, given.get("string_delims") or (), bool(given.get("unquoted_keys")))
    inner = given.get("value_parser") or {"name": "raw"}
    if kind == "xml-inline":
        pairs = [(one["key"], one["value"]) for one in re.finditer(given["tag_pattern"], text, re.DOTALL)]
    elif kind == "kv-lines":
        comma, colon = given.get("line_sep", "\n"), given.get("kv_sep", ":")
        lines = [line.strip().split(colon, 1) for line in text.split(comma) if colon in line]
        pairs = [(key.strip(), value.strip()) for key, value in lines]
    else:
        return _simple(text, kind)
    return {key: _content(value, inner.get("name", "text"), inner.get("args") or {}) for key, value in pairs}


def _simple(text: str, kind: str) -> Any:
    bare = text.strip()
    if kind in ("int", "float"):
        return int(bare) if kind == "int" else float(bare)
    if kind == "bool":
        return bare.lower() in ("true", "1")
    return text if kind == "raw" else bare


def _json(text: str, quotes: Sequence[Sequence[str]], bare_keys: bool) -> Any:
    """JSON in which texts may stand between marks and keys may be bare."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[1])
        return f"\x01{len(kept) - 1}\x02"

    for begin, end in quotes:
        text = re.sub(f"{re.escape(begin)}(.*?){re.escape(end)}", keep, text, flags=re.DOTALL)
    if bare_keys:
        text = re.sub(r"(?<=[{,])\s*(\w+)\s*:", r'"\1":', text)
    return json.loads(re.sub("\x01(\\d+)\x02", lambda found: json.dumps(kept[int(found[1])]), text))
