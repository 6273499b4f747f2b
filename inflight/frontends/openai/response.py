"""Answers of the OpenAI routes: bodies, chunks, usage, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from inflight import __version__
from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InflightError,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
)
from inflight.frontends.asgi import Header
from inflight.frontends.generate import PlainError, Whole, number
from inflight.generation import Finish, FinishReason, Start, Token, TokenInfo

FINGERPRINT = f"inflight-{__version__}"
REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass
class Usage:
    """Tokens of one request. Several choices of one prompt count its tokens once."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    _prompts: dict[int, None] = field(default_factory=dict)

    def add(self, prompt: int, start: Start, finish: Finish) -> None:
        """One choice of prompt number `prompt` has ended."""
        self.completion += finish.generated
        if prompt not in self._prompts:
            self._prompts[prompt] = None
            self.prompt += finish.prompt_length
            self.cached += start.cached

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """What all parts of one answer have in common.

    Args:
        kind: `chat.completion` or `text_completion`.
        model: as the client named it, else the served one.
    """

    def __init__(self, kind: str, model: str) -> None:
        self.chat = kind == "chat.completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common = {
            "id": name,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._chunk = {**self._common, "object": "chat.completion.chunk" if self.chat else kind}

    def whole(self, results: Sequence[Whole], usage: Usage, logprobs: bool) -> dict[str, Any]:
        choices = []
        for index, one in enumerate(results):
            choice: dict[str, Any] = {"index": index}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": one.finish.text}
            else:
                choice["text"] = one.finish.text
            choice["logprobs"] = self._logprobs(one.tokens) if logprobs else None
            choice["finish_reason"] = REASONS[one.finish.reason]
            choices.append(choice)
        return {**self._common, "choices": choices, "usage": usage.json()}

    def role(self, index: int) -> bytes:
        """The first chunk of a chat's choice."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def token(self, index: int, token: Token, logprobs: bool) -> bytes:
        """A chunk with what a token adds."""
        found = self._logprobs([token]) if logprobs else None
        if self.chat:
            return self._delta(index, {"content": token.delta}, found, None)
        return self._text(index, token.delta, found, None)

    def finish(self, index: int, finish: Finish) -> bytes:
        """The last chunk of a choice, with text that had been held back."""
        reason = REASONS[finish.reason]
        if self.chat:
            return self._delta(index, {"content": finish.delta} if finish.delta else {}, None, reason)
        return self._text(index, finish.delta, None, reason)

    def usage(self, usage: Usage) -> bytes:
        return orjson.dumps({**self._chunk, "choices": [], "usage": usage.json()})

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return orjson.dumps({**self._chunk, "choices": [choice]})

    def _text(self, index: int, text: str, logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return orjson.dumps({**self._chunk, "choices": [choice]})

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        if self.chat:
            return {
                "content": [{**_named(one.info), "top_logprobs": [_named(info) for info in one.top]} for one in tokens]
            }
        offsets, offset = [], 0
        for one in tokens:
            offsets.append(offset)
            offset += len(one.info.text)
        return {
            "tokens": [one.info.text for one in tokens],
            "token_logprobs": [number(one.info.logprob) for one in tokens],
            "top_logprobs": [{info.text: number(info.logprob) for info in one.top} for one in tokens],
            "text_offset": offsets,
        }


def _named(info: TokenInfo) -> dict[str, Any]:
    logprob = number(info.logprob)
    return {
        "token": info.text,
        "logprob": -9999.0 if logprob is None else logprob,
        "bytes": list(info.text.encode()),
    }


def error_json(error: InflightError) -> tuple[int, bytes, list[Header]]:
    """Status, body and headers of an error in OpenAI's shape."""
    status, kind, code = _classify(error)
    headers: list[Header] = [(b"retry-after", b"1")] if status in (429, 503) else []
    body = {
        "error": {"message": str(error), "type": kind, "param": None, "code": code, "http_status_code": status},
    }
    return status, orjson.dumps(body), headers


def _classify(error: InflightError) -> tuple[int, str, str | None]:
    if isinstance(error, PlainError):
        return error.status, "invalid_request_error", None
    if isinstance(error, Overloaded):
        return 429, "overloaded", "rate_limit_exceeded"
    if isinstance(error, NotFound):
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, TooLarge):
        return 413, "invalid_request_error", None
    if isinstance(error, InvalidRequest):
        return 422, "invalid_request_error", None
    if isinstance(error, Unavailable):
        return 503, "service_unavailable", None
    if isinstance(error, DeadlineExceeded):
        return 504, "timeout", None
    if isinstance(error, Cancelled):
        return 499, "cancelled", None
    return 500, "server_error", None
