"""Answers of the OpenAI routes: bodies, chunks, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    TokenInfo,
    Whole,
)
from inflight.frontends.llm import number
from inflight.version import __version__

FINGERPRINT = f"inflight-{__version__}"
REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "stop", FinishReason.STOP: "stop"}


@dataclass
class Usage:
    """Counts the tokens of one request, and the seconds spent on them. Several choices of one prompt count it once."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reading: float = 0.0
    writing: float = 0.0
    _prompts: dict[int, None] = field(default_factory=dict)

    def add(self, prompt: int, start: Start, finish: Finish) -> None:
        """Adds a choice of prompt number `prompt` that has ended."""
        self.completion += finish.generated
        self.writing += max(0.0, finish.inference - start.computing)
        if prompt not in self._prompts:
            self._prompts[prompt] = None
            self.prompt += finish.prompt_length
            self.cached += start.cached
            self.reading += start.computing

    def timings(self) -> dict[str, Any]:
        """The fields of llama-server: milliseconds and tokens per second, summed over the choices."""
        computed = self.prompt - self.cached
        return {
            "cache_n": self.cached,
            "prompt_n": computed,
            "prompt_ms": self.reading * 1000,
            "prompt_per_second": _rate(computed, self.reading),
            "predicted_n": self.completion,
            "predicted_ms": self.writing * 1000,
            "predicted_per_second": _rate(self.completion, self.writing),
        }

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
        reader: opens the reader of a chat's answer.
        thoughts: show the thoughts too.
        echo: texts before the answers, one for each prompt.
        most: number of most likely tokens to name; the model names more where several are equally likely.
        scored: the number of most likely tokens that vLLM's field `prompt_logprobs` names at each of the prompt's
            places; None: the answer does not have the field.
        counted: every chunk has the field `usage`, null in all but the last one.
        tgi: chunks as TGI writes them: every delta of a chat names the role, the last one has a content; the field
            `finish_reason` of a completion is never null, and its last chunk counts the tokens.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        *,
        logprobs: bool = False,
        reader: Callable[[], AnswerReader] | None = None,
        thoughts: bool = True,
        echo: Sequence[str] | None = None,
        most: int = 0,
        scored: int | None = None,
        counted: bool = False,
        tgi: bool = False,
    ) -> None:
        self._tgi, self._most, self._scored, self._counted = tgi, most, scored, counted
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
        if counted:
            self._chunk["usage"] = None
        self._logprobs = logprobs
        self._open, self._thoughts = reader, thoughts
        self._readers: dict[int, AnswerReader] = {}
        self._reasoning = 0

    # A whole answer

    def whole(self, results: Sequence[Whole], usage: Usage, choices: int) -> dict[str, Any]:
        """The whole answer. Args: results: `choices` of the first prompt, then of the second, and so on."""
        listed: list[dict[str, Any]] = []
        for index, one in enumerate(results):
            choice: dict[str, Any] = {"index": index}
            reason = REASONS[one.finish.reason]
            if self.chat:
                choice["message"], calls = self._message(one)
                reason = _reason(reason, calls)
            else:
                before = self.echo[index // choices] if self.echo is not None else ""
                choice["text"] = before + one.finish.text
            choice["logprobs"] = self._probabilities(one.tokens, one.start) if self._logprobs else None
            choice["finish_reason"] = reason
            if self._scored is not None and not self.chat:
                first = index % choices == 0  # the choices of a prompt share it
                told_of = prompt_logprobs(one.start, self._scored) if first else listed[-1]["prompt_logprobs"]
                choice["prompt_logprobs"] = told_of
            listed.append(choice)
        told = {**self._common, "choices": listed, "usage": self._usage(usage), **self._timed(usage)}
        if self._scored is not None and self.chat:
            told["prompt_logprobs"] = prompt_logprobs(results[0].start, self._scored)
        return told

    def _message(self, one: Whole) -> tuple[dict[str, Any], int]:
        """The assistant's message and the number of calls in it."""
        reader = self._reader(0)
        parts = [part for token in one.tokens for part in reader.feed(token)]
        parts += reader.finish(one.finish)
        del self._readers[0]
        self._reasoning += reader.reasoning_tokens
        content = "".join(part.text for part in parts if isinstance(part, Content))
        thought = "".join(part.text for part in parts if isinstance(part, Reasoning)) if self._thoughts else ""
        bare = not reader.calls and not reader.reasoning_tokens
        message: dict[str, Any] = {"role": "assistant", "content": content if content or bare else None}
        if thought:
            message |= {"reasoning_content": thought, "reasoning": thought}
        if reader.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": "".join(
                            part.text for part in parts if isinstance(part, CallArguments) and part.index == call.index
                        ),
                    },
                }
                for call in parts
                if isinstance(call, CallBegin)
            ]
        return message, reader.calls

    def _reader(self, index: int) -> AnswerReader:
        reader = self._readers.get(index)
        if reader is None:
            assert self._open is not None
            reader = self._readers[index] = self._open()
        return reader

    # Chunks

    def start(self, index: int, choices: int, start: Start = Start(0)) -> list[bytes]:
        """The first chunk of a choice: a chat's role, or the prompt if it is echoed."""
        if self.chat:
            return [] if self._tgi else [self._delta(index, {"role": "assistant", "content": ""}, None, None)]
        if self.echo is not None:
            found = self._probabilities((), start) if self._logprobs else None
            return [self._text(index, self.echo[index // choices], found, None)]
        return []

    def token(self, index: int, token: Token) -> list[bytes]:
        """The chunks for one token."""
        found = self._probabilities([token]) if self._logprobs else None
        if not self.chat:
            # A token without visible text, such as half a character, gets a chunk only for its probability.
            return [self._text(index, token.delta, found, None)] if token.delta or found else []
        return self._pieces(index, self._reader(index).feed(token), found)

    def finish(self, index: int, finish: Finish, start: Start = Start(0)) -> list[bytes]:
        """The last chunks of a choice: the text that was held back, then the reason without a text."""
        reason = REASONS[finish.reason]
        timed = None
        if not self._counted:  # else in the chunk with the usage
            timed = Usage()
            timed.add(0, start, finish)
        if not self.chat:
            held = [self._text(index, finish.delta, None, None)] if finish.delta else []
            return [*held, self._text(index, "", None, reason, finish if self._tgi else None, timed)]
        reader = self._reader(index)
        pieces = self._pieces(index, reader.finish(finish), None)
        self._reasoning += reader.reasoning_tokens
        return [*pieces, self._delta(index, self._last(reader.calls), None, _reason(reason, reader.calls), timed)]

    def _last(self, calls: int) -> dict[str, Any]:
        """The delta beside the reason. TGI's clients read a content, or, behind calls, arguments there."""
        if not self._tgi:
            return {}
        return _piece_delta(CallArguments(calls - 1, "")) if calls else {"content": ""}

    def usage(self, usage: Usage) -> bytes:
        return orjson.dumps({**self._chunk, "choices": [], "usage": self._usage(usage), **self._timed(usage)})

    def _timed(self, usage: Usage | None) -> dict[str, Any]:
        return {"timings": usage.timings()} if usage is not None and not self._tgi else {}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        told = usage.json()
        if self.chat:
            told["completion_tokens_details"] = {"reasoning_tokens": self._reasoning}
        return told

    def _pieces(self, index: int, pieces: Sequence[Part], logprobs: Any) -> list[bytes]:
        chunks = []
        for piece in pieces:
            if isinstance(piece, Reasoning) and not self._thoughts:
                continue
            chunks.append(self._delta(index, _piece_delta(piece), logprobs, None))
            logprobs = None
        if logprobs is not None:
            chunks.append(self._delta(index, {"content": ""}, logprobs, None))
        return chunks

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None, timed: Usage | None = None
    ) -> bytes:
        if self._tgi:
            delta = {"role": "assistant", **delta}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return orjson.dumps({**self._chunk, "choices": [choice], **self._timed(timed)})

    def _text(
        self,
        index: int,
        text: str,
        logprobs: Any,
        reason: str | None,
        finish: Finish | None = None,
        timed: Usage | None = None,
    ) -> bytes:
        """A chunk of a completion. Args: finish: its tokens are counted in the chunk; timed: its timings are told."""
        shown = "" if reason is None and self._tgi else reason
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": shown}
        chunk = {**self._chunk, "choices": [choice], **self._timed(timed)}
        if finish is not None:
            counted = Usage()
            counted.add(0, Start(0), finish)
            chunk["usage"] = counted.json()
        return orjson.dumps(chunk)

    def _probabilities(self, tokens: Sequence[Token], start: Start = Start(0)) -> dict[str, Any]:
        """Log-probabilities of an answer's tokens; of a completion that echoes its prompt also those of the prompt."""
        if self.chat:
            return {
                "content": [
                    {**_named(one.info), "top_logprobs": [_named(info) for info in one.top[: self._most]]}
                    for one in tokens
                ]
            }
        prompt = start.prompt if self.echo is not None else ()
        infos = [*prompt, *(one.info for one in tokens)]
        offsets, offset = [], 0
        for info in infos:
            offsets.append(offset)
            offset += len(info.text)
        likely = (
            [*(start.prompt_top or [()] * len(prompt)), *(one.top for one in tokens)]
            if prompt
            else [one.top for one in tokens]
        )
        return {
            "tokens": [info.text for info in infos],
            "token_logprobs": [number(info.logprob) for info in infos],
            # A place without a probability, such as the first one, has no likely tokens either.
            "top_logprobs": [
                None if info.logprob is None else _by_text(top[: self._most]) for info, top in zip(infos, likely)
            ],
            "text_offset": offsets,
        }


def prompt_logprobs(start: Start, most: int) -> list[dict[str, Any] | None]:
    """A prompt's log-probabilities as vLLM names them: for each token but the first the token itself and the most
    likely ones, by their ids. `rank` is null for a token that is not among those."""
    found: list[dict[str, Any] | None] = []
    for info, top in zip(start.prompt, start.prompt_top or [()] * len(start.prompt)):
        if info.logprob is None:
            found.append(None)
            continue
        ranks = {one.id: rank for rank, one in enumerate(top, 1)}
        shown = {one.id: one for one in (info, *top[:most])}
        found.append(
            {
                str(one.id): {"logprob": number(one.logprob), "rank": ranks.get(one.id), "decoded_token": one.text}
                for one in shown.values()
            }
        )
    return found


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _by_text(infos: Sequence[TokenInfo]) -> dict[str, float | None]:
    """Log-probabilities by text. Of tokens with one text, such as halves of characters, all but the first are named by
    their number."""
    found: dict[str, float | None] = {}
    for info in infos:
        found[f"token_id:{info.id}" if info.text in found else info.text] = number(info.logprob)
    return found


def _reason(reason: str, calls: int) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


def _piece_delta(piece: Part) -> dict[str, Any]:
    if isinstance(piece, Reasoning):
        return {"reasoning_content": piece.text, "reasoning": piece.text}
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
        "bytes": list(info.text.encode() if info.raw is None else info.raw),
    }
