"""Chat templates: Jinja, sandboxed, with the names that templates written for transformers expect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inflight.contract import Chat
from inflight.errors import InvalidRequest, TemplateError
from inflight.text.answers import find_form

_MARK = "<|the-answer-goes-on-here|>"
"""Marks the end of a text that is to be continued. It is added before the template runs, because the prompt may contain
the text itself in several places."""

MAX_PROMPT = 1 << 24
"""Most characters of a rendered prompt; a template that writes more is stopped."""


DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of templates that transformers picks by default: `TOOL_USE` for chats with tools if the model has it."""

_LONGEST_NAME = 60

_WAYS_TO_TYPE = (".type", "['type']", '["type"]', "selectattr('type'", 'selectattr("type"')
_ASKS_FOR_NONE = re.compile(r"content\W{0,3}\s*(is\s+(not\s+)?none\b|[!=]=\s*none\b)", re.IGNORECASE)
"""A template's question whether a content is null."""

_RARE = ("quizzaciously", "zyzzogeton")
"""Words that no template writes of its own accord: contents of trial messages."""

_CALL_ID = 9
"""Letters of a call's id in Mistral's templates, which refuse others."""


class ChatTemplate:
    """A model's compiled chat templates.

    Args:
        templates: a Jinja text, or several by name; the default is the one named `default`, else the first.
        tokens: special tokens by the names that templates use (`bos_token`, `eos_token`, ...).

    Raises:
        TemplateError: one cannot be compiled.
    """

    def __init__(self, templates: str | Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        self._sources = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
        self._first = DEFAULT if DEFAULT in self._sources else next(iter(self._sources))
        self._tokens = dict(tokens or {})
        environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        self._forms: dict[str, tuple[bool, bool]] = {}
        for name, source in self._sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except Exception as error:  # compiling may exhaust Python's stack or produce invalid Python
                what = "chat template" if len(self._sources) == 1 else f"chat template '{name}'"
                raise TemplateError(f"the model's {what} is broken: {error or type(error).__name__}") from error

    @property
    def source(self) -> str:
        """The source of the default template."""
        return self._sources[self._first]

    @property
    def tool_source(self) -> str:
        """The source of the template that is taken where tools are given."""
        return self._sources[self._pick(None, tools=True)]

    def reads_tools(self, name: str | None, calls: str | None = None) -> bool:
        """Whether a template shows tools and how they are called; otherwise both are written into messages.

        Args:
            name: of the template; None: the one that is taken where tools are given.
            calls: the form of the model's calls, for that one.

        Raises:
            InvalidRequest: unknown template name.
        """
        source = self._sources[self._pick(name, tools=True)]
        if name is not None or calls is None:
            calls = find_form(source, lambda text: None).calls
        return "tools" in source and calls is not None

    def render(self, chat: Chat, placeholder: str | None = None) -> str:
        """The prompt. If the last message is the assistant's, the prompt ends with its text, to be continued, unless
        the chat says otherwise (`Chat.goes_on`).

        Args:
            placeholder: the text at an image's place; None: the model reads text only. A template that does not write
                it for a message's images gets it as text, in front of the message's own.

        Raises:
            TemplateError: the template refused the messages, with its own text.
            InvalidRequest: a part of a message is neither a text nor, for a model that reads images, an image; or the
                last message is to be continued and cannot be.
        """
        name = self._pick(chat.template, bool(chat.tools))
        messages = [_adapted(message, self._sources[name]) for message in chat.messages]
        images = sum(_check_parts(message, placeholder) for message in messages)
        reads_texts, reads_parts = self._contents(name)
        only_parts = reads_parts and not reads_texts
        if reads_parts:
            given = [_in_parts(message) for message in messages] if only_parts else messages
            prompt = self._prompt(name, chat, given)
            if placeholder is None or prompt.count(placeholder) >= images:
                return prompt
        texts = [_in_one(message, placeholder or "") for message in messages]
        return self._prompt(name, chat, [_in_parts(message) for message in texts] if only_parts else texts)

    def _contents(self, name: str) -> tuple[bool, bool]:
        """Whether a template shows a content that is a text, and one that is a list of parts.

        One trial of each tells it; the source decides about a template that shows neither.
        """
        if name not in self._forms:
            text, parts = " ".join(_RARE), [{"type": "text", "text": word} for word in _RARE]
            reads = self._shows(name, text), self._shows(name, parts)
            self._forms[name] = reads if any(reads) else (True, _wants_parts(self._sources[name]))
        return self._forms[name]

    def _shows(self, name: str, content: object) -> bool:
        try:
            prompt = self._run(
                name, Chat([{"role": "user", "content": content}]), [{"role": "user", "content": content}]
            )
        except TemplateError:
            return False
        # a list written as Python or JSON shows its words in quotes
        quoted = isinstance(content, list) and any(mark + _RARE[1] in prompt for mark in "'\"")
        return all(word in prompt for word in _RARE) and not quoted

    def _prompt(self, name: str, chat: Chat, messages: list[dict[str, object]]) -> str:
        marked = _marked(messages, chat.goes_on)
        if marked is not None:
            prompt, found, _ = self._run(name, chat, marked).rpartition(_MARK)
            if found:
                return prompt
        if chat.goes_on:
            raise InvalidRequest(
                "`continue_final_message` needs a last message with a text that the chat template shows as it is"
            )
        return self._run(name, chat, messages)  # also if the template changes that text

    def _pick(self, name: str | None, tools: bool) -> str:
        """The template of that name, or the one that transformers would take."""
        if name is None:
            return TOOL_USE if tools and TOOL_USE in self._sources else self._first
        if name not in self._sources:
            shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
            raise InvalidRequest(
                f"`chat_template` is {shown!r}, and templates in requests are not run; name one of the model's: "
                f"{', '.join(self._sources)}"
            )
        return name

    def _run(self, name: str, chat: Chat, messages: list[dict[str, object]]) -> str:
        values: dict[str, object] = {
            **self._tokens,
            "messages": messages,
            "tools": chat.tools,
            "documents": None,
            "add_generation_prompt": chat.prompts,
            **chat.kwargs,
        }
        parts: list[str] = []
        size = 0
        try:
            for part in self._compiled[name].generate(values):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT:
                    raise TemplateError(f"the chat template makes a prompt of more than {MAX_PROMPT} characters")
        except TemplateError:
            raise
        except Exception as error:  # a template is code: it raises anything
            raise TemplateError(str(error) or type(error).__name__) from error
        return "".join(parts)


def _wants_parts(source: str) -> bool:
    """Whether a template reads the parts of a content; otherwise it gets one text."""
    return "content" in source and any(way in source for way in _WAYS_TO_TYPE)


def _adapted(message: dict[str, Any], source: str) -> dict[str, Any]:
    """A message in the words of a template: its names of roles, null contents beside calls, and ids of calls."""
    if message.get("role") == "developer" and "developer" not in source:
        message = {**message, "role": "system"}
    if message.get("tool_calls") and message.get("content") is None and not _ASKS_FOR_NONE.search(source):
        message = {**message, "content": ""}
    thought = message.get("reasoning_content")
    if thought and message.get("tool_calls") and not message.get("content") and "message.thinking" in source:
        message = {**message, "thinking": thought}  # gpt-oss's name; beside a content its template refuses it
    if "[TOOL_CALLS]" in source:
        if isinstance(message.get("tool_call_id"), str):
            message = {**message, "tool_call_id": _short(message["tool_call_id"])}
        if message.get("tool_calls"):
            calls = [
                {**call, "id": _short(str(call["id"]))} if call.get("id") else call for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
    return message


def _short(call_id: str) -> str:
    """The last letters and digits of a call's id, which tell ids of one origin apart."""
    return "".join(letter for letter in call_id if letter.isalnum())[-_CALL_ID:].rjust(_CALL_ID, "0")


def _check_parts(message: dict[str, object], placeholder: str | None) -> int:
    """The number of images among the parts of a message.

    Raises:
        InvalidRequest: a part is neither a text nor an image, or an image is none for this model.
    """
    content, images = message.get("content"), 0
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and placeholder is not None:
            images += 1
        elif kind != "text":
            reads = "text only; send content parts of type 'text'" if placeholder is None else "texts and images"
            raise InvalidRequest(f"this model reads {reads}")
    return images


def _in_parts(message: dict[str, object]) -> dict[str, object]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _in_one(message: dict[str, object], placeholder: str) -> dict[str, object]:
    """A message whose content is one text: a line with the places of its images, then its texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    places = placeholder * sum(part["type"] == "image" for part in content)
    text = "".join(str(part.get("text", "")) for part in content)
    return {**message, "content": f"{places}\n{text}" if places else text}


def _marked(messages: list[dict[str, object]], goes_on: bool | None) -> list[dict[str, object]] | None:
    """The messages with a mark where the model is to continue; None if it does not.

    The prompt is cut at the mark, because a template closes the message after it. Blanks at the end of the text are
    dropped, as in TGI: tokens begin with them.
    """
    *before, last = messages or [{}]
    if goes_on is False or last.get("tool_calls") or not (goes_on or last.get("role") == "assistant"):
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


def named_templates(found: object) -> dict[str, str]:
    """Templates by name from tokenizer_config.json's value: a text, or several by name in a list or an object.

    Raises:
        TemplateError: it is none of these.
    """
    if found is None:
        return {}
    if isinstance(found, str):
        return {DEFAULT: found}
    named = dict(found) if isinstance(found, Mapping) else _by_name(found)
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise TemplateError(
            "chat_template in tokenizer_config.json must be a text, or a list of objects with name and template"
        )
    return named


def pick_templates(own: Mapping[str, str], configured: object, replaced: bool = False) -> dict[str, str]:
    """A model's chat templates by name; `default` is used for most chats.

    As in transformers, templates in files of their own take precedence over those in tokenizer_config.json, whose
    `default` remains if no file has one.

    Args:
        own: templates of chat_template.jinja and additional_chat_templates/NAME.jinja.
        configured: `chat_template` of tokenizer_config.json.
        replaced: the tokenizer_config.json is not the model's own; it takes precedence over the files.

    Raises:
        TemplateError: `configured` is neither a text nor several by name.
    """
    held = named_templates(configured)
    if held and (replaced or not own):
        return held
    return {**({} if DEFAULT in own else held), **own}


def _by_name(found: object) -> dict[Any, Any]:
    """A list of named templates as a dict; entries that are not named templates get the key None."""
    items = found if isinstance(found, list) else [found]
    given = [item if isinstance(item, Mapping) else {} for item in items]
    return {str(item["name"]) if "name" in item else None: item.get("template") for item in given}
