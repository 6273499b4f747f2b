"""`/v1/responses`: the chat of `/v1/chat/completions` in OpenAI's newer form. Nothing is stored between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import orjson

from inflight.contract import (
    AnswerReader,
    CallArguments,
    CallBegin,
    Content,
    Finish,
    FinishReason,
    Part,
    Reasoning,
    Start,
    Token,
    Whole,
)
from inflight.errors import InflightError, InvalidRequest, OpenAi
from inflight.frontends.openai.request import IMAGE_URL, ChatBody
from inflight.frontends.openai.response import Usage

_TEXT_PARTS = ("input_text", "output_text", "text")


class _NoFiles(InvalidRequest):
    openai = OpenAi(400, "invalid_request_error")


class ResponsesBody(msgspec.Struct, kw_only=True):
    """`POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = None
    background: bool | None = None
    user: Any = None  # keeps a caller's requests with one target of an alias


def chat_body(body: ResponsesBody) -> ChatBody:
    """The body as that of a chat.

    Raises:
        InvalidRequest: it refers to something that would have to be stored, or holds an unknown item.
    """
    if body.previous_response_id is not None or body.background:
        raise InvalidRequest("responses are not stored: send the whole conversation as `input`, and no `background`")
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            _add(messages, item, index)
    form = (body.text or {}).get("format") or {"type": "text"}
    if not isinstance(form, dict):
        raise InvalidRequest("`text.format` must be an object")
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") != "allowed_tools":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return ChatBody(
        messages=messages,
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        response_format=form,
        tools=[_tool(tool) for tool in body.tools or [] if tool.get("type") == "function"] or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )


def _add(messages: list[dict[str, Any]], item: dict[str, Any], index: int) -> None:
    kind = item.get("type", "message")
    if kind == "message" and isinstance(item.get("role"), str):
        role = "system" if item["role"] == "developer" else item["role"]
        messages.append({"role": role, "content": _content(item.get("content"), index)})
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        called = {"id": item.get("call_id"), "type": "function", "function": call}
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(called)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [called]})
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else _content(output, index)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    elif kind != "reasoning":
        raise InvalidRequest(f"`input[{index}]` must be a message, a function_call or a function_call_output")


def _content(content: Any, index: int) -> str | list[dict[str, Any]]:
    """A content in the form of a chat: one text, or parts if there is an image among them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"`input[{index}].content` must be a string or a list of parts")
    parts = [_part(part, f"input[{index}].content[{at}]") for at, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "input_image":
        if part.get("file_id") is not None:
            raise _NoFiles(f"`{where}` names a file, and this server stores none; send the image as `image_url`")
        return {"type": IMAGE_URL, IMAGE_URL: {"url": part.get(IMAGE_URL), "detail": part.get("detail")}}
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise InvalidRequest(f"`{where}` must be of type input_text or input_image")
    return {"type": "text", "text": part["text"]}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as a chat's. Tools of other types are passed over: agents offer OpenAI's own beside theirs."""
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


class ResponseReply:
    """One response, whole or as events.

    Args:
        reader: of the answer.
        timed: tell llama-server's timings beside the usage.
    """

    def __init__(self, body: ResponsesBody, model: str, reader: AnswerReader, timed: bool = True) -> None:
        self._body, self._timed = body, timed
        self._model = model
        self._reader = reader
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._sequence = 0
        self._start = Start(0)

    def whole(self, result: Whole) -> dict[str, Any]:
        """The answer of a generation that has ended."""
        written: list[Start | Token | Finish] = [result.start, *result.tokens, result.finish]
        for event in written:
            for _ in self.events(event):
                pass
        return self._response(result.finish)

    def begin(self) -> Iterator[tuple[str, bytes]]:
        """The first events."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))

    def events(self, event: Start | Token | Finish) -> Iterator[tuple[str, bytes]]:
        """Names and data of the events for one event of the generation."""
        if isinstance(event, Start):
            self._start = event
        elif isinstance(event, Token):
            for piece in self._reader.feed(event):
                yield from self._piece(piece)
        else:
            for piece in self._reader.finish(event):
                yield from self._piece(piece)
            if not self._items:
                yield from self._piece(Content(""))
            yield from self._close()
            status = "response.completed" if event.reason is not FinishReason.LENGTH else "response.incomplete"
            yield self._event(status, response=self._response(event))

    def failed(self, error: InflightError) -> tuple[str, bytes]:
        """The last event of a generation that failed."""
        return self._event("error", code=error.openai.code, message=str(error), param=None)

    def _piece(self, piece: Part) -> Iterator[tuple[str, bytes]]:
        last = self._items[-1] if self._items else None
        if isinstance(piece, CallBegin):
            yield from self._close()
            item = {"type": "function_call", "id": f"fc_{piece.id}", "call_id": piece.id, "name": piece.name}
            yield from self._open({**item, "arguments": "", "status": "in_progress"})
        elif isinstance(piece, CallArguments):
            assert last is not None
            last["arguments"] += piece.text
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=piece.text)
        elif isinstance(piece, Reasoning):
            if last is None or last["type"] != "reasoning" or last["status"] != "in_progress":
                yield from self._close()
                yield from self._open(
                    {
                        "type": "reasoning",
                        "id": f"rs_{uuid.uuid4().hex}",
                        "summary": [],
                        "content": [],
                        "status": "in_progress",
                    }
                )
                part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
                self._items[-1]["content"].append(part)
                yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)
            self._items[-1]["content"][0]["text"] += piece.text
            yield self._event("response.reasoning_text.delta", **self._place(), content_index=0, delta=piece.text)
        else:
            if last is None or last["type"] != "message" or last["status"] != "in_progress":
                yield from self._close()
                message: dict[str, Any] = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
                yield from self._open({**message, "content": [], "status": "in_progress"})
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                self._items[-1]["content"].append(part)
                yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)
            self._items[-1]["content"][0]["text"] += piece.text
            yield self._event(
                "response.output_text.delta", **self._place(), content_index=0, delta=piece.text, logprobs=[]
            )

    def _open(self, item: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> Iterator[tuple[str, bytes]]:
        """The events that end the current item."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            where = {**self._place(), "content_index": 0}
            yield self._event("response.output_text.done", **where, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", **where, part=part)
        elif item["type"] == "reasoning":
            part = item["content"][0]
            where = {**self._place(), "content_index": 0}
            yield self._event("response.reasoning_text.done", **where, text=part["text"])
            yield self._event("response.content_part.done", **where, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done", **self._place(), arguments=item["arguments"], name=item["name"]
            )
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _event(self, kind: str, **fields: Any) -> tuple[str, bytes]:
        data = orjson.dumps({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return kind, data

    def _response(self, finish: Finish | None) -> dict[str, Any]:
        body = self._body
        cut = finish is not None and finish.reason is FinishReason.LENGTH
        usage: dict[str, Any] | None = None
        timings: dict[str, Any] = {}
        if finish is not None:
            if self._timed:
                counted = Usage()
                counted.add(0, self._start, finish)
                timings = {"timings": counted.timings()}
            usage = {
                "input_tokens": finish.prompt_length,
                "input_tokens_details": {"cached_tokens": self._start.cached},
                "output_tokens": finish.generated,
                "output_tokens_details": {"reasoning_tokens": self._reader.reasoning_tokens},
                "total_tokens": finish.prompt_length + finish.generated,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if finish is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
            **timings,
        }
