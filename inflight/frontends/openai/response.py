"""Answers of the OpenAI routes: bodies, chunks, usage, errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from inflight import __version__
from inflight.contract import Finish, FinishReason, Start, Token, TokenInfo, ToolFormat, Whole
from inflight.errors import InflightError
from inflight.frontends.llm import number
from inflight.frontends.openai.answers import OpenAiError
from inflight.frontends.openai.tools import CallArguments, CallBegin, Content, Piece, ToolReader
from inflight.frontends.routes import error_headers
from inflight.wire import JSON, Refusal

FINGERPRINT = f"inflight-{__version__}"
REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass
class Usage:
    """Counts the tokens of one request. Several choices of one prompt count its tokens once."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    _prompts: dict[int, None] = field(default_factory=dict)

    def add(self, prompt: int, start: Start, finish: Finish) -> None:
        """Adds a choice of prompt number `prompt` that has ended."""
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
    """Writes the parts of one answer.

    Args:
        kind: `chat.completion` or `text_completion`.
        model: the name that the client used, else that of the served model.
        logprobs: report log-probabilities.
        tools: the form of tool calls in the answer; None: it is not searched for calls.
        echo: texts before the answers, one for each prompt.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        *,
        logprobs: bool = False,
        tools: ToolFormat | None = None,
        echo: Sequence[str] | None = None,
    ) -> None:
        self.chat = kind == "chat.completion"
        self.echo = echo
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common = {
            "id": name,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._chunk = {**self._common, "object": "chat.completion.chunk" if self.chat else kind}
        self._logprobs = logprobs
        self._tools = tools
        self._readers: dict[int, ToolReader] = {}

    # A whole answer

    def whole(self, results: Sequence[Whole], usage: Usage, choices: int) -> dict[str, Any]:
        """The whole answer. Args: results: `choices` of the first prompt, then of the second, and so on."""
        listed = []
        for index, one in enumerate(results):
            choice: dict[str, Any] = {"index": index}
            reason = REASONS[one.finish.reason]
            if self.chat:
                choice["message"], calls = self._message(one)
                reason = _reason(reason, calls)
            else:
                before = self.echo[index // choices] if self.echo is not None else ""
                choice["text"] = before + one.finish.text
            choice["logprobs"] = self._probabilities(one.tokens, one.start.prompt) if self._logprobs else None
            choice["finish_reason"] = reason
            listed.append(choice)
        return {**self._common, "choices": listed, "usage": usage.json()}

    def _message(self, one: Whole) -> tuple[dict[str, Any], int]:
        """The assistant's message and the number of calls in it."""
        if self._tools is None:
            return {"role": "assistant", "content": one.finish.text}, 0
        reader = ToolReader(self._tools)
        pieces: list[Piece] = []
        for token in one.tokens:
            pieces += reader.feed(self._visible(token))
        pieces += [*reader.feed(one.finish.delta), *reader.finish()]
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not reader.calls else None}
        if reader.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": "".join(
                            piece.text
                            for piece in pieces
                            if isinstance(piece, CallArguments) and piece.index == call.index
                        ),
                    },
                }
                for call in pieces
                if isinstance(call, CallBegin)
            ]
        return message, reader.calls

    # Chunks

    def start(self, index: int, choices: int) -> list[bytes]:
        """The first chunk of a choice: a chat's role, or the prompt if it is echoed."""
        if self.chat:
            return [self._delta(index, {"role": "assistant", "content": ""}, None, None)]
        if self.echo is not None:
            return [self._text(index, self.echo[index // choices], None, None)]
        return []

    def token(self, index: int, token: Token) -> list[bytes]:
        """The chunks for one token."""
        found = self._probabilities([token]) if self._logprobs else None
        if not self.chat:
            # A token without visible text, such as half a character, gets a chunk only for its probability.
            return [self._text(index, token.delta, found, None)] if token.delta or found else []
        if self._tools is None:
            return [self._delta(index, {"content": token.delta}, found, None)] if token.delta or found else []
        reader = self._readers.setdefault(index, ToolReader(self._tools))
        return self._pieces(index, reader.feed(self._visible(token)), found)

    def finish(self, index: int, finish: Finish) -> list[bytes]:
        """The last chunks of a choice, with the text that was held back."""
        reason = REASONS[finish.reason]
        if not self.chat:
            return [self._text(index, finish.delta, None, reason)]
        reader = self._readers.pop(index, None)
        if reader is None:
            return [self._delta(index, {"content": finish.delta} if finish.delta else {}, None, reason)]
        pieces = [*reader.feed(finish.delta), *reader.finish()]
        return [
            *self._pieces(index, pieces, None),
            self._delta(index, {}, None, _reason(reason, reader.calls)),
        ]

    def usage(self, usage: Usage) -> bytes:
        return orjson.dumps({**self._chunk, "choices": [], "usage": usage.json()})

    def _pieces(self, index: int, pieces: Sequence[Piece], logprobs: Any) -> list[bytes]:
        chunks = []
        for piece in pieces:
            chunks.append(self._delta(index, _piece_delta(piece), logprobs, None))
            logprobs = None
        if logprobs is not None:
            chunks.append(self._delta(index, {"content": ""}, logprobs, None))
        return chunks

    def _visible(self, token: Token) -> str:
        """The text of a token that is searched for calls: the mark that begins them may be a special token."""
        if self._tools is not None and token.info.id == self._tools.begin_id:
            return token.info.text + token.delta
        return token.delta

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return orjson.dumps({**self._chunk, "choices": [choice]})

    def _text(self, index: int, text: str, logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return orjson.dumps({**self._chunk, "choices": [choice]})

    def _probabilities(self, tokens: Sequence[Token], prompt: Sequence[TokenInfo] = ()) -> dict[str, Any]:
        if self.chat:
            return {
                "content": [{**_named(one.info), "top_logprobs": [_named(info) for info in one.top]} for one in tokens]
            }
        infos = [*prompt, *(one.info for one in tokens)]
        offsets, offset = [], 0
        for info in infos:
            offsets.append(offset)
            offset += len(info.text)
        tops: list[Any] = [None] * len(prompt)
        return {
            "tokens": [info.text for info in infos],
            "token_logprobs": [number(info.logprob) for info in infos],
            "top_logprobs": tops + [{info.text: number(info.logprob) for info in one.top} for one in tokens],
            "text_offset": offsets,
        }


def _reason(reason: str, calls: int) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


def _piece_delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Content):
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.index}
    if isinstance(piece, CallBegin):
        call |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": piece.text}
    return {"tool_calls": [call]}


def _named(info: TokenInfo) -> dict[str, Any]:
    logprob = number(info.logprob)
    return {
        "token": info.text,
        "logprob": -9999.0 if logprob is None else logprob,
        "bytes": list(info.text.encode()),
    }


def error_json(error: InflightError) -> bytes:
    """An error in OpenAI's shape."""
    status, kind, code = error.openai
    told: OpenAiError = {
        "error": {"message": str(error), "type": kind, "param": None, "code": code, "http_status_code": status},
        "error_type": error.failure,  # the field that TGI's clients read
    }
    return orjson.dumps(told)


def refusal(error: InflightError) -> Refusal:
    """An error as one response."""
    return Refusal(error.openai.status, [JSON, *error_headers(error)], error_json(error))
