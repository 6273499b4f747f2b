"""Answers of Anthropic's routes: messages, events, errors."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from inflight.contract import (
    AnswerReader,
    CallArguments,
    CallBegin,
    Content,
    Event,
    Finish,
    FinishReason,
    Part,
    Reasoning,
    Start,
    Token,
    Whole,
)
from inflight.errors import InflightError
from inflight.frontends.anthropic.answers import MessagesError
from inflight.wire import JSON, Header, Refusal

Named = tuple[str, bytes]
"""An event's name and its data."""

PING: Named = ("ping", b'{"type":"ping"}')


class MessageReply:
    """One message, whole or as events. It serves one generation.

    Args:
        model: the name that the client used, else that of the served model.
        reader: separates the answer into its parts.
        hidden: thoughts are told without their text.
    """

    def __init__(self, model: str, reader: AnswerReader, *, hidden: bool = False) -> None:
        self._model = model
        self._reader = reader
        self._hidden = hidden
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._start = Start(0)
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # whether the last block may still grow
        self._arguments: list[str] = []  # of the call in the last block

    def whole(self, result: Whole) -> dict[str, Any]:
        """The answer of a generation that has ended."""
        written: list[Event] = [result.start, *result.tokens, result.finish]
        for event in written:
            for _ in self.events(event):
                pass
        blocks = self._blocks or [{"type": "text", "text": ""}]  # clients read the first block unasked
        return self._message(blocks, self._stop(result.finish), result.finish)

    def events(self, event: Event) -> Iterator[Named]:
        """The events for one event of the generation."""
        if isinstance(event, Start):
            self._start = event
            message = self._message([], {"stop_reason": None, "stop_sequence": None}, None)
            yield _named("message_start", message=message)
            yield PING
        elif isinstance(event, Token):
            yield from self._parts(self._reader.feed(event))
        else:
            yield from self._parts(self._reader.finish(event))
            yield from self._close()
            yield _named("message_delta", delta=self._stop(event), usage=self._usage(event))
            yield _named("message_stop")

    def _parts(self, parts: Iterable[Part]) -> Iterator[Named]:
        for part in parts:
            if isinstance(part, CallBegin):
                yield from self._begin({"type": "tool_use", "id": _call_id(part.id), "name": part.name, "input": {}})
            elif isinstance(part, CallArguments):
                self._arguments.append(part.text)
                yield self._delta("input_json_delta", "partial_json", part.text)
            elif isinstance(part, Reasoning):
                if not self._grows("thinking"):
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                if not self._hidden:
                    self._blocks[-1]["thinking"] += part.text
                    yield self._delta("thinking_delta", "thinking", part.text)
            elif isinstance(part, Content):
                if not self._grows("text"):
                    yield from self._begin({"type": "text", "text": ""})
                self._blocks[-1]["text"] += part.text
                yield self._delta("text_delta", "text", part.text)

    def _grows(self, kind: str) -> bool:
        return self._open and self._blocks[-1]["type"] == kind

    def _begin(self, block: dict[str, Any]) -> Iterator[Named]:
        yield from self._close()
        self._blocks.append(block)
        self._open, self._arguments = True, []
        yield _named("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _delta(self, kind: str, field: str, text: str) -> Named:
        delta = {"type": kind, field: text}
        return _named("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> Iterator[Named]:
        """The events that end the last block."""
        if not self._open:
            return
        self._open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            yield self._delta("signature_delta", "signature", "")
        elif block["type"] == "tool_use":
            block["input"] = _input("".join(self._arguments))
        yield _named("content_block_stop", index=len(self._blocks) - 1)

    def _stop(self, finish: Finish) -> dict[str, Any]:
        if finish.reason is FinishReason.STOP and finish.stop is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
        if finish.reason is FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if self._reader.calls else "end_turn", "stop_sequence": None}

    def _message(self, content: list[dict[str, Any]], stop: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        common = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**common, "content": content, **stop, "usage": self._usage(finish)}

    def _usage(self, finish: Finish | None) -> dict[str, Any]:
        return {
            "input_tokens": self._start.prompt_length - self._start.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._start.cached,
            "output_tokens": 0 if finish is None else finish.generated,
            "output_tokens_details": {"thinking_tokens": self._reader.reasoning_tokens},
        }


def _call_id(id: str) -> str:
    """A call's id in Anthropic's form; ids that a model has to see again stay as they are."""
    return f"toolu_{id.removeprefix('call_')}" if id.startswith("call_") else id


def _input(text: str) -> dict[str, Any]:
    """The arguments of a call as an object, which clients demand. What is none stays visible under `arguments`: the
    model wrote something else, or was cut off."""
    try:
        found = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        found = text
    return found if isinstance(found, dict) else {"arguments": text}


def _named(kind: str, **fields: Any) -> Named:
    return kind, orjson.dumps({"type": kind, **fields})


def error_json(error: InflightError) -> bytes:
    """An error in Anthropic's shape."""
    told: MessagesError = {"type": "error", "error": {"type": error.anthropic.type, "message": str(error)}}
    return orjson.dumps(told)


def refusal(error: InflightError) -> Refusal:
    """An error as one response."""
    return Refusal(error.anthropic.status, [JSON, request_id(), *error.headers], error_json(error))


def request_id() -> Header:
    """A header that clients put into the texts of their errors."""
    return b"request-id", f"req_{uuid.uuid4().hex[:24]}".encode()
