"""Tool calls: offers tools to a model and constrains its calls to their schemas by a grammar.

Every model family writes calls in its own form. If a chat template has no tools, they are written into a message, and a
grammar allows either a text or calls, so that one generation is enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from inflight.contract import JSON_OPTIONS, AnswerForm, AnswerReader, Chat, Grammar, ToolFormat
from inflight.errors import ToolError

PLAIN = ToolFormat("plain", "")
"""For templates without tools: one JSON object a call, one call a line."""

_READ = {"hermes": "hermes", "mistral": "mistral", "llama3": "llama3_json", "plain": "json"}
"""Names of the forms in `inflight.text`."""

_END = 256
"""Characters of a prompt's end that tell whether it opens the thought."""

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
        answer: how the model writes the answer.
        calls: the answer is searched for calls.
        most: calls that are reported; None: all.
        grammar: the grammar of the answer; None: any text.
    """

    chat: Chat
    answer: AnswerForm = field(default_factory=AnswerForm)
    calls: bool = False
    most: int | None = None
    grammar: Grammar | None = None

    def reader(self, prompt: str) -> AnswerReader:
        """A reader for one answer to this prompt."""
        from inflight.text import open_reader  # servers of classic models do without it

        return open_reader(self.answer, prompt[-_END:], self.chat.tools or (), calls=self.calls, most=self.most)


def offer(
    chat: Chat,
    given: list[dict[str, Any]] | None,
    choice: Any,
    parallel: bool,
    native: ToolFormat | None,
    prompt: str,
    answer: AnswerForm = AnswerForm(),
) -> Tools:
    """Applies a request's `tools` and `tool_choice`.

    Args:
        chat: the conversation, without tools.
        native: the form of calls in the model's chat template, where a grammar can hold the model to it.
        answer: how the model writes its answers; without a form of calls, tools are written into a message.
        prompt: text before the tools if they are written into a message; empty: a default sentence.

    Raises:
        ToolError: a tool without a name, or a choice of a tool that does not exist.
    """
    tools = [_tool(each, index) for index, each in enumerate(given or [])]
    wanted, named = _choice(choice, tools)
    if not tools or wanted == "none":
        return Tools(chat, answer)
    allowed = [tool for tool in tools if named in (None, tool.name)]
    format = native or PLAIN
    grammar: Grammar | None = None
    if native is None and answer.calls is not None:
        pass  # a form that is read, and that no grammar is made of
    elif wanted == "required":
        grammar = _lark(allowed, format, free=False, several=parallel and named is None)
    elif native is None or any(tool.strict for tool in tools):
        grammar = _lark(allowed, format, free=True, several=parallel)
    if answer.calls is None:
        answer = replace(answer, calls=_READ[format.kind])
    most = None if parallel and named is None else 1
    return Tools(replace(chat, tools=given, tool_prompt=prompt), answer, True, most, grammar)


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
