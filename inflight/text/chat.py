"""Prepares a conversation for a chat template: earlier calls and their results, and tools for templates without any."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from inflight.contract import Chat
from inflight.errors import InvalidRequest

TOOL_PROMPT = (
    "You may call functions. To call one, answer with nothing but a JSON object like "
    '{"name": "<function>", "arguments": {<its arguments>}}. These functions are available:'
)


def prefill_of(chat: Chat) -> str:
    """The assistant's text that the answer continues; empty: it begins a message."""
    last = chat.messages[-1] if chat.messages and chat.goes_on is not False else {}
    return _text(last.get("content")) if last.get("role") == "assistant" and not last.get("tool_calls") else ""


def shown(chat: Chat, native: bool) -> Chat:
    """The conversation in the form that the template gets. All chat doors use this.

    Args:
        native: the template shows tools, calls and results; otherwise they become texts.

    Raises:
        InvalidRequest: a message's `tool_calls` have another form.
    """
    chat = replace(chat, messages=[_history(message, native) for message in chat.messages])
    tools = [_for_template(tool) for tool in chat.tools or []]
    if native or not tools:
        return replace(chat, tools=tools or None)
    return replace(chat, messages=_written_in(chat.messages, tools, chat.tool_prompt or TOOL_PROMPT), tools=None)


def _for_template(given: dict[str, Any]) -> dict[str, Any]:
    """A tool as templates expect it: the schema under `parameters`."""
    function = dict(given["function"])
    if "arguments" in function and "parameters" not in function:
        function["parameters"] = function.pop("arguments")
    return {**given, "type": "function", "function": function}


def _history(message: dict[str, Any], native: bool) -> dict[str, Any]:
    """Earlier calls and results as the template can show them."""
    if isinstance(message.get("reasoning"), str) and "reasoning_content" not in message:
        message = {**message, "reasoning_content": message["reasoning"]}
    calls = message.get("tool_calls")
    if not native:
        if message.get("role") == "tool":
            return {"role": "user", "content": _joined("Result of the function: ", message.get("content"))}
        if calls:
            written = "\n".join(json.dumps(_call(call), ensure_ascii=False) for call in calls)
            text = _text(message.get("content"))
            return {"role": message["role"], "content": f"{text}\n{written}" if text else written}
        return message
    if calls:  # templates write `arguments | tojson`, but clients send arguments as JSON text
        return {
            **message,
            "content": message.get("content"),
            "tool_calls": [{**call, "type": "function", "function": _call(call)} for call in calls],
        }
    return message


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest('a message\'s `tool_calls` must hold {"function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            pass  # the model's arguments were not JSON; they are shown as they are
    return {"name": function["name"], "arguments": {} if arguments is None else arguments}


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _joined(before: str, content: Any, after: str = "") -> Any:
    """A content between two texts: one text, or parts if it holds an image."""
    if isinstance(content, list) and any(isinstance(part, dict) and part.get("type") == "image" for part in content):
        ends = [{"type": "text", "text": text} for text in (before, after)]
        return [part for part in (ends[0], *content, ends[1]) if part.get("text") != ""]
    return f"{before}{_text(content)}{after}"


def _written_in(messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """Adds the tools as JSON to the last message that is not the assistant's, whose text the model may continue."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    asked = [index for index, message in enumerate(messages) if message.get("role") != "assistant"]
    if not asked:
        return [{"role": "user", "content": f"{prompt}\n{listed}"}, *messages]
    last = messages[asked[-1]]
    content = _joined("", last.get("content"), f"\n---\n{prompt}\n{listed}")
    return [*messages[: asked[-1]], {**last, "content": content}, *messages[asked[-1] + 1 :]]
