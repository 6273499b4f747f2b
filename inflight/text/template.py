"""Chat templates: Jinja, sandboxed, with the names that templates written for transformers expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inflight.errors import InvalidRequest, TemplateError
from inflight.generation import Chat, ToolFormat

_MARK = "<|the-answer-goes-on-here|>"
"""Stands at the end of a text that is to be continued while the template is run: the text itself may be anywhere."""

MAX_PROMPT = 1 << 24
"""Characters of a rendered prompt; a template that makes more is stopped."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja text.
        tokens: special tokens by the names that templates use (`bos_token`, `eos_token`, ...).
        tool_source: another template for chats with tools, where the model has one.

    Raises:
        TemplateError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, tool_source: str | None = None) -> None:
        self.source = source
        self._tool_source = tool_source or source
        self._tokens = dict(tokens or {})
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._tools = environment.from_string(tool_source) if tool_source else self._template
        except Exception as error:  # compiling runs out of Python's stack, or makes no Python
            raise TemplateError(f"the model's chat template is broken: {error or type(error).__name__}") from error
        # A template that never looks into a content's parts wants it as one text.
        self._wants_parts = "content" in source and (".type" in source or "['type']" in source or '["type"]' in source)

    @property
    def tool_format(self) -> ToolFormat | None:
        """How calls are written, by the marks that the template uses itself; None where it has no tools."""
        source = self._tool_source
        if "tools" not in source:
            return None
        if "[TOOL_CALLS]" in source:
            return ToolFormat("mistral", "[TOOL_CALLS]")
        if "<tool_call>" in source and "<function=" not in source:
            return ToolFormat("hermes", "<tool_call>")
        if "<|python_tag|>" in source or "ipython" in source:
            return ToolFormat("llama3", "<|python_tag|>")
        return None

    def render(self, chat: Chat) -> str:
        """The prompt. Where the last message is the assistant's, the prompt ends with its text, to be continued.

        Raises:
            TemplateError: the template refused the messages, with its own text.
        """
        messages = [self._message(message) for message in chat.messages]
        marked = _marked(messages)
        if marked is not None:
            prompt, found, _ = self._run(chat, marked).rpartition(_MARK)
            if found:
                return prompt
        return self._run(chat, messages)  # also where a template does not show that text as it is

    def _run(self, chat: Chat, messages: list[dict[str, object]]) -> str:
        values: dict[str, object] = {
            **self._tokens,
            "messages": messages,
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": True,
            **chat.kwargs,
        }
        template = self._tools if chat.tools else self._template
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(values):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT:
                    raise TemplateError(f"the chat template makes a prompt of more than {MAX_PROMPT} characters")
        except TemplateError:
            raise
        except Exception as error:  # a template is code: it raises anything
            raise TemplateError(str(error) or type(error).__name__) from error
        return "".join(parts)

    def _message(self, message: dict[str, object]) -> dict[str, object]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        texts: list[str] = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise InvalidRequest("this model reads text only; send content parts of type 'text'")
            texts.append(str(part.get("text", "")))
        return message if self._wants_parts else {**message, "content": "".join(texts)}


def _marked(messages: list[dict[str, object]]) -> list[dict[str, object]] | None:
    """The messages with a mark where the assistant is to go on; None where the last text is not an assistant's.

    What a template writes after it would end the very text that is to go on. Blanks at its end are left out, as TGI
    has it: tokens begin with them.
    """
    *before, last = messages or [{}]
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return None
    content = last.get("content")
    if isinstance(content, str) and content.strip():
        return [*before, {**last, "content": content.rstrip() + _MARK}]
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        *parts, part = content
        text = part.get("text")
        if isinstance(text, str) and text.strip():
            return [*before, {**last, "content": [*parts, {**part, "text": text.rstrip() + _MARK}]}]
    return None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here it is shown as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def pick_template(found: object) -> tuple[str | None, str | None]:
    """The template for chats and the one for chats with tools, of what tokenizer_config.json holds: a text, or
    several by name, in a list or in an object.

    Raises:
        TemplateError: it is neither.
    """
    if found is None or isinstance(found, str):
        return found, None
    named = dict(found) if isinstance(found, Mapping) else _by_name(found)
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise TemplateError(
            "chat_template in tokenizer_config.json must be a text, or a list of objects with name and template"
        )
    default = named.get("default") or next(iter(named.values()), None)
    return default, named.get("tool_use")


def _by_name(found: object) -> dict[Any, Any]:
    """Of a list of named templates; what is none has no name."""
    items = found if isinstance(found, list) else [found]
    given = [item if isinstance(item, Mapping) else {} for item in items]
    return {str(item["name"]) if "name" in item else None: item.get("template") for item in given}
