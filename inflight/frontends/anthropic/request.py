"""The body of `/v1/messages`, and the same as a chat's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from inflight.errors import InvalidRequest, ToolError
from inflight.frontends.anthropic.blocks import Block, images_and_texts, text_of
from inflight.frontends.openai import ChatBody

_BILLING = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n*")
"""Coding agents begin the system prompt with this line. It differs in every request and is not for the model: in a
prompt it would leave nothing that the prefix cache could find again."""

_THINKING = ("enabled", "adaptive", "between_tools", "disabled")


class CountBody(msgspec.Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`. Unknown fields are ignored, also `cache_control`: all prefixes are cached."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    metadata: Any = None  # its `user_id` keeps a caller's requests with one target of an alias


class MessagesBody(CountBody, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def chat_body(body: CountBody) -> ChatBody:
    """The body as that of a chat.

    Raises:
        InvalidRequest: a message or a block has another form, or is of a kind that no model here reads.
        ToolError: a tool or the choice among them has another form.
    """
    config = body.output_config or {}
    form = config.get("format") or body.output_format
    thinking, budget = _thinking(body.thinking)
    kwargs: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    if config.get("effort") is not None:
        kwargs["reasoning_effort"] = config["effort"]
    choice, parallel = _choice(body.tool_choice)
    chat = ChatBody(
        messages=[*_system(body.system), *_messages(body.messages)],
        model=body.model,
        tools=[_tool(tool, index) for index, tool in enumerate(body.tools or []) if _is_function(tool)] or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_response_format(form),
        chat_template_kwargs=kwargs or None,
        thinking_token_budget=budget,
    )
    if isinstance(body, MessagesBody):
        if body.max_tokens < 1:
            raise InvalidRequest("`max_tokens` must be at least 1")
        chat.max_tokens, chat.stop, chat.stream = body.max_tokens, body.stop_sequences, body.stream
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    return chat


def _system(given: str | Sequence[Block] | None) -> list[dict[str, Any]]:
    """The system message, without the billing header of coding agents; none where nothing is left."""
    if given is None:
        return []
    texts = [given] if isinstance(given, str) else [text_of(block, f"system[{at}]") for at, block in enumerate(given)]
    text = "".join(_BILLING.sub("", each, count=1) if _BILLING.match(each) else each for each in texts)
    return [{"role": "system", "content": text}] if text else []


def _messages(given: Sequence[Block]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions that were called, by the calls' ids
    for index, message in enumerate(given):
        role, content, where = message.get("role"), message.get("content"), f"messages[{index}]"
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
            raise InvalidRequest(f"`{where}.content` must be a text or a list of blocks")
        if role == "user":
            found += _from_user(content, where, names)
        elif role == "assistant":
            found.append(_from_assistant(content, where, names))
        elif role == "system":
            found += _system(content) if not found else _reminder(content)
        else:
            raise InvalidRequest(f"`{where}.role` must be user or assistant")
    return _turns(found)


def _reminder(content: Sequence[Block]) -> list[dict[str, Any]]:
    """What the system says in the middle, as coding agents write it into a user's turn: many chat templates refuse a
    system message that is not the first."""
    return [
        {"role": "user", "content": f"<system-reminder>\n{each['content']}\n</system-reminder>"}
        for each in _system(content)
    ]


def _turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with messages of one role in a row as one turn, as Anthropic takes them; templates may demand turns."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else message
        if not found or message["role"] != last["role"] or message["role"] not in ("user", "assistant"):
            found.append(message)
            continue
        joined = {**last, "content": _together(last["content"], message["content"])}
        if "tool_calls" in message:
            joined["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
        if "reasoning_content" in message:
            joined["reasoning_content"] = last.get("reasoning_content", "") + message["reasoning_content"]
        found[-1] = joined
    return found


def _together(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    parts = [[{"type": "text", "text": each}] if isinstance(each, str) else each for each in (first, second)]
    return [*parts[0], *parts[1]]


def _from_user(content: Sequence[Block], where: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The results of calls as messages of tools, then all else as a message of the user's."""
    found: list[dict[str, Any]] = []
    rest: list[tuple[Block, str]] = []
    for at, block in enumerate(content):
        place = f"{where}.content[{at}]"
        if block.get("type") != "tool_result":
            rest.append((block, place))
            continue
        called = block.get("tool_use_id")
        if not isinstance(called, str):
            raise InvalidRequest(f"`{place}.tool_use_id` must be the id of a `tool_use` block")
        message = {"role": "tool", "tool_call_id": called, "content": _result(block, place)}
        found.append({**message, "name": names[called]} if called in names else message)
    parts = images_and_texts(rest)
    if parts or not found:
        found.append({"role": "user", "content": _joined(parts)})
    return found


def _result(block: Block, where: str) -> str | list[dict[str, Any]]:
    """What a tool answered; a failure says so in its text."""
    content = block.get("content")
    if content is None or isinstance(content, str):
        parts = [{"type": "text", "text": content or ""}]
    elif isinstance(content, list) and all(isinstance(each, dict) for each in content):
        parts = images_and_texts([(each, f"{where}.content[{at}]") for at, each in enumerate(content)])
    else:
        raise InvalidRequest(f"`{where}.content` must be a text or a list of blocks")
    if block.get("is_error") is True:
        told = next((part["text"] for part in parts if part["type"] == "text"), "")
        if "error" not in told[:64].lower():
            parts = [{"type": "text", "text": "Error: "}, *parts]
    return _joined(parts)


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One text, or the parts if there is an image among them."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _from_assistant(content: Sequence[Block], where: str, names: dict[str, str]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(content):
        kind, place = block.get("type"), f"{where}.content[{at}]"
        if kind == "tool_use":
            name, called = block.get("name"), block.get("id")
            if not isinstance(name, str) or not isinstance(called, str):
                raise InvalidRequest(f"`{place}` must have an `id` and a `name`")
            names[called] = name
            function = {"name": name, "arguments": block.get("input") or {}}
            calls.append({"id": called, "type": "function", "function": function})
        elif kind == "thinking":
            if not isinstance(block.get("thinking"), str):
                raise InvalidRequest(f"`{place}.thinking` must be a text")
            thoughts.append(block["thinking"])
        elif kind == "text":
            texts.append(text_of(block, place))
        # What Anthropic's own tools did, and thoughts that only Anthropic can read, is passed over.
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    return message


def _is_function(tool: Block) -> bool:
    """Whether a tool is the client's own function. Those that Anthropic defines have a type and no schema."""
    return tool.get("type") in (None, "custom")


def _tool(tool: Block, index: int) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise ToolError(f"`tools[{index}].name` is missing")
    function: dict[str, Any] = {"name": tool["name"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema") or {"type": "object", "properties": {}}
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _choice(given: Mapping[str, Any] | None) -> tuple[Any, bool | None]:
    """`tool_choice` and `parallel_tool_calls` of a chat."""
    if given is None:
        return None, None
    parallel = False if given.get("disable_parallel_tool_use") is True else None
    kind = given.get("type")
    if kind == "tool" and isinstance(given.get("name"), str):
        return {"type": "function", "function": {"name": given["name"]}}, parallel
    if kind not in ("auto", "any", "none"):
        raise ToolError('`tool_choice` must be {"type": "auto" | "any" | "none"} or {"type": "tool", "name": ...}')
    return "required" if kind == "any" else kind, parallel


def _response_format(form: Any) -> dict[str, Any] | None:
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise InvalidRequest('`output_config.format` must be {"type": "json_schema", "schema": {...}}')
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}


def _thinking(given: Mapping[str, Any] | None) -> tuple[bool | None, int | None]:
    """Whether the model is to think, None as its template does without being told, and the most tokens of a thought."""
    if given is None:
        return None, None
    kind, budget = given.get("type"), given.get("budget_tokens")
    if kind not in _THINKING:
        raise InvalidRequest(f"`thinking.type` must be one of {', '.join(_THINKING)}")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise InvalidRequest("`thinking.budget_tokens` must be a whole number of at least 1")
    return kind != "disabled", budget if kind != "disabled" else None
