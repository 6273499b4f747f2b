"""Tool calls: offers tools to a model, constrains its calls to their schemas by a grammar, parses calls as they arrive.

Every model family writes calls in its own form. If a chat template has no tools, they are written into a message, and a
grammar allows either a text or calls, so that one generation is enough.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inflight.contract import JSON_OPTIONS, Chat, Grammar, ToolFormat
from inflight.errors import ToolError

PLAIN = ToolFormat("plain", "")
"""For templates without tools: one JSON object a call, one call a line."""

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """One function: its name and its arguments' JSON schema."""

    name: str
    parameters: dict[str, Any]
    strict: bool


@dataclass(frozen=True)
class Tools:
    """The tools of one request.

    Attributes:
        chat: the conversation with the tools in it.
        format: the form of calls; None: the answer is not searched for calls.
        grammar: the grammar of the answer; None: any text.
    """

    chat: Chat
    format: ToolFormat | None = None
    grammar: Grammar | None = None


def offer(
    chat: Chat, given: list[dict[str, Any]] | None, choice: Any, parallel: bool, native: ToolFormat | None, prompt: str
) -> Tools:
    """Applies a request's `tools` and `tool_choice`.

    Args:
        chat: the conversation, without tools.
        native: the form of calls in the model's chat template; None if it has no tools.
        prompt: text before the tools if they are written into a message; empty: a default sentence.

    Raises:
        ToolError: a tool without a name, or a choice of a tool that does not exist.
    """
    tools = [_tool(each, index) for index, each in enumerate(given or [])]
    wanted, named = _choice(choice, tools)
    if not tools or wanted == "none":
        return Tools(chat)
    allowed = [tool for tool in tools if named in (None, tool.name)]
    format = native or PLAIN
    grammar: Grammar | None = None
    if wanted == "required":
        grammar = _lark(allowed, format, free=False, several=parallel and named is None)
    elif native is None or any(tool.strict for tool in tools):
        grammar = _lark(allowed, format, free=True, several=parallel)
    return Tools(replace(chat, tools=given, tool_prompt=prompt), format, grammar)


def _tool(given: dict[str, Any], index: int) -> Tool:
    function = given.get("function") if given.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ToolError(f'`tools[{index}]` must be {{"type": "function", "function": {{"name": ...}}}}')
    if not _NAME.fullmatch(function["name"]):
        raise ToolError(f"`tools[{index}].function.name` may hold letters, digits and _ . : - only")
    parameters = function.get("parameters", function.get("arguments"))
    if parameters is not None and not isinstance(parameters, dict):
        raise ToolError(f"`tools[{index}].function.parameters` must be a JSON schema")
    return Tool(function["name"], parameters or {"type": "object"}, function.get("strict") is True)


def _choice(choice: Any, tools: Sequence[Tool]) -> tuple[str, str | None]:
    """`auto`, `none` or `required`, and the name of the one function that must be called."""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if not isinstance(name, str):
            raise ToolError('`tool_choice` must be {"type": "function", "function": {"name": ...}}')
        choice = name
    elif choice is None or choice in ("auto", "none", "required"):
        return choice or "auto", None
    if not isinstance(choice, str) or choice not in [tool.name for tool in tools]:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise ToolError(f"`tool_choice` names {choice!r}, which is not among the tools: {known}")
    return "required", choice


def _lark(tools: Sequence[Tool], format: ToolFormat, *, free: bool, several: bool) -> Grammar:
    """The grammar of calls of these tools in the model's own form.

    Args:
        free: allow a text too; calls may follow it if the form has a mark that begins them.
        several: allow more than one call.
    """
    key = "parameters" if format.kind == "llama3" else "arguments"
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
        # Every function's schema is a document of its own, so that `$ref` finds its definitions.
        schema = json.dumps({**tool.parameters, "x-guidance": JSON_OPTIONS})
        rules.append(f'call_{index}: {head} %json {schema} "}}"')
    mark = f"<[{format.begin_id}]>" if format.begin_id is not None else json.dumps(format.begin)
    if format.kind == "hermes":
        end = json.dumps("\n</tool_call>")
        body = f'"\\n" call {end}'
        if not free:
            rules.append(f"tag: {mark} {body}")
            start = 'tag ("\\n" tag)*' if several else "tag"
        elif format.begin_id is not None:
            rules.append(f"tag: TEXT {mark} {body}")
            start = "tag* TEXT" if several else "tag? TEXT"
        else:
            rules += [f"begun[lazy]: TEXT {mark}", f"tag: begun {body}"]
            start = "tag* TEXT" if several else "tag? TEXT"
        rules.append("TEXT: /(.|\\n)*/" if free else "")
    elif format.kind == "mistral":
        calls = 'call (", " call)*' if several else "call"
        rules.append(f'tag: {mark} " [" {calls} "]"')
        start = "TEXT | tag" if free else "tag"
        rules.append("TEXT: /([^\\[](.|\\n)*)?/" if free else "")
    else:
        between = json.dumps("; " if format.kind == "llama3" else "\n")
        calls = f"call ({between} call)*" if several else "call"
        start = f"TEXT | {calls}" if free else calls
        rules.append("TEXT: /([^{](.|\\n)*)?/" if free else "")
    return Grammar("lark", "\n".join([f"start: {start}", *(rule for rule in rules if rule)]) + "\n")


@dataclass(frozen=True)
class Content:
    """A piece of the visible text."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The beginning of call number `index`, of this function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the JSON of a call's arguments."""

    index: int
    text: str


Piece = Content | CallBegin | CallArguments

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
_DECODER = json.JSONDecoder()
MAX_HEAD = 4096
"""Characters after which an object without a function's name is taken for text."""


class ToolReader:
    """Separates calls from text while a generation arrives.

    Attributes:
        calls: number of calls that have begun.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._buffer = ""
        self._state = self._text
        self._began = False  # text was shown; in forms without a mark no call follows
        self._fresh = False
        self._opened = ""  # the mark that was read; it is shown as text if no call follows
        self._depth = 0
        self._quoted = self._escaped = False
        self.calls = 0

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are complete with the next text."""
        self._buffer += text
        return self._run(False)

    def finish(self) -> list[Piece]:
        """The remaining pieces, after the generation has ended."""
        return self._run(True)

    def _run(self, final: bool) -> list[Piece]:
        found: list[Piece] = []
        while self._state(found, final):
            pass
        return found

    # States: each consumes what it can of the buffer and returns whether to run the next state at once.

    def _text(self, found: list[Piece], final: bool) -> bool:
        if self._fresh:  # white space after a call is dropped
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return False
            self._fresh = False
        buffer, mark = self._buffer, self._format.begin
        if self._format.kind in ("llama3", "plain") and not self._began:
            rest = buffer.lstrip()
            if mark and rest.startswith(mark):
                return self._enter(rest[len(mark) :], mark)
            if rest.startswith("{"):
                return self._enter(rest, "")
            if not final and (not rest or (mark and mark.startswith(rest))):
                return False
        elif self._format.kind in ("hermes", "mistral"):
            place = buffer.find(mark)
            if place >= 0:
                self._show(buffer[:place], found)
                return self._enter(buffer[place + len(mark) :], mark)
            if not final:
                held = next(
                    (n for n in range(min(len(mark) - 1, len(buffer)), 0, -1) if mark.startswith(buffer[-n:])), 0
                )
                cut = len(buffer) - held
                if not buffer[:cut].strip() and not self._began:
                    return False  # white space before a call is dropped
                self._show(buffer[:cut], found)
                self._buffer = buffer[cut:]
                return False
        self._show(buffer, found)
        self._buffer = ""
        return False

    def _enter(self, rest: str, mark: str) -> bool:
        self._buffer, self._opened = rest, mark
        self._state = self._call
        return True

    def _call(self, found: list[Piece], final: bool) -> bool:
        rest = self._buffer.lstrip(" \t\r\n[" if self._format.kind == "mistral" else None)
        head = _HEAD.match(rest)
        if head is not None:
            self._begin(json.loads(f'"{head[1]}"'), found)
            self._buffer = rest[head.end() :]
            self._state = self._value
            return True
        if rest.startswith("{"):
            try:
                whole, end = _DECODER.raw_decode(rest)
            except ValueError:
                if not final and len(rest) < MAX_HEAD:
                    return False
            else:
                if isinstance(whole.get("name"), str):
                    self._begin(whole["name"], found)
                    arguments = whole.get("arguments", whole.get("parameters", {}))
                    found.append(CallArguments(self.calls - 1, json.dumps(arguments, ensure_ascii=False)))
                    self._buffer = rest[end:]
                    self._state = self._after
                    return True
        elif not rest and not final:
            return False
        # It is not a call: the supposed beginning is text.
        self._began = True
        self._show(self._opened + self._buffer, found)
        self._buffer = ""
        self._state = self._text
        return False

    def _begin(self, name: str, found: list[Piece]) -> None:
        found.append(CallBegin(self.calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.calls += 1
        self._depth, self._quoted, self._escaped = 0, False, False

    def _value(self, found: list[Piece], final: bool) -> bool:
        end = self._scan(self._buffer)
        part = self._buffer if end is None else self._buffer[:end]
        if part:
            found.append(CallArguments(self.calls - 1, part))
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._state = self._close
        return True

    def _close(self, found: list[Piece], final: bool) -> bool:
        """Skips the rest of the call's object: usually its brace, sometimes an id before it."""
        self._depth = max(self._depth, 1)
        end = self._scan(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._state = self._after
        return True

    def _after(self, found: list[Piece], final: bool) -> bool:
        rest = self._buffer.lstrip()
        if not rest:
            return False
        self._buffer = rest
        if self._format.kind == "hermes":
            end = "</tool_call>"
            if end.startswith(rest) and rest != end and not final:
                return False
            self._buffer = rest.removeprefix(end)
        elif rest[0] in ",;" or rest[0] == "{":
            return self._enter(rest.lstrip(",;"), "")
        elif self._format.kind == "mistral":
            self._buffer = rest.removeprefix("]")
        else:
            self._began = True
        self._state = self._text
        self._fresh = True
        return bool(self._buffer)

    def _scan(self, text: str) -> int | None:
        """The index in `text` at which the current value ends; None if it continues after `text`."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                if char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
                    if not self._depth:
                        return index + 1
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                if not self._depth:  # a bare number ends where its object does
                    return index
                self._depth -= 1
                if not self._depth:
                    return index + 1
            elif char == "," and not self._depth:
                return index
        return None

    def _show(self, text: str, found: list[Piece]) -> None:
        if text and (text.strip() or self._began or not self.calls):
            self._began = True
            found.append(Content(text))
