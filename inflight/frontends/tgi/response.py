"""TGI's answers: bodies, headers, frames, errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import orjson

from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InflightError,
    InvalidRequest,
    NotFound,
    Overloaded,
    TemplateError,
    TooLarge,
    Unavailable,
)
from inflight.frontends.generate import PlainError, Whole, number
from inflight.frontends.routes import MethodNotAllowed, error_headers
from inflight.frontends.tgi.request import Asked
from inflight.generation import Finish, GeneratorInfo, Token, TokenInfo
from inflight.wire import JSON, Header, Refusal, Send, respond


def compute_type(info: GeneratorInfo) -> Header:
    """`<count>-<device>`, or what the environment says."""
    return (b"x-compute-type", os.environ.get("COMPUTE_TYPE", f"{info.world_size}-{info.device_type}").encode())


def token_json(info: TokenInfo) -> dict[str, Any]:
    return {"id": info.id, "text": info.text, "logprob": number(info.logprob), "special": info.special}


def generation_json(asked: Asked, results: Sequence[Whole], full_text: bool) -> dict[str, Any]:
    """The answer of several generations of one request: the likeliest wins."""
    winner = max(results, key=lambda one: one.mean_logprob)
    answer: dict[str, Any] = {"generated_text": _text(asked, winner, full_text)}
    if asked.details:
        details = _details(asked, winner)
        losers = [one for one in results if one is not winner]
        if losers:
            details["best_of_sequences"] = [
                {"generated_text": _text(asked, one, full_text), **_details(asked, one)} for one in losers
            ]
        answer["details"] = details
    return answer


def _text(asked: Asked, one: Whole, full_text: bool) -> str:
    return f"{asked.request.prompt}{one.finish.text}" if full_text else one.finish.text


def _details(asked: Asked, one: Whole) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": one.finish.reason.value,
        "generated_tokens": one.finish.generated,
        "seed": asked.seed,
        "prefill": [{"id": info.id, "text": info.text, "logprob": number(info.logprob)} for info in one.start.prompt],
        "tokens": [token_json(token.info) for token in one.tokens],
    }
    if asked.request.sampling.top_n_tokens:
        details["top_tokens"] = [[token_json(info) for info in token.top] for token in one.tokens]
    return details


def timing_headers(info: GeneratorInfo, prompt: str, one: Whole, validation: float, total: float) -> list[Header]:
    """What TGI reports beside a whole answer; times in milliseconds, `x-compute-time` in seconds."""
    finish = one.finish
    inference = finish.inference
    each = inference / max(1, finish.generated)
    milliseconds = {
        "x-total-time": total,
        "x-validation-time": validation,
        "x-queue-time": one.start.queued,
        "x-inference-time": inference,
        "x-time-per-token": each,
    }
    return [
        compute_type(info),
        (b"x-compute-time", f"{total:.6f}".encode()),
        (b"x-compute-characters", str(len(prompt)).encode()),
        *((name.encode(), str(int(value * 1000)).encode()) for name, value in milliseconds.items()),
        (b"x-prompt-tokens", str(finish.prompt_length).encode()),
        (b"x-generated-tokens", str(finish.generated).encode()),
    ]


def frame(index: int, token: Token, asked: Asked, finish: Finish | None, full_text: bool) -> bytes:
    """One event of a stream; the last token's event holds the whole text too."""
    event: dict[str, Any] = {"index": index, "token": token_json(token.info)}
    if asked.request.sampling.top_n_tokens:
        event["top_tokens"] = [token_json(info) for info in token.top]
    event["generated_text"] = None
    event["details"] = None
    if finish is not None:
        event["generated_text"] = f"{asked.request.prompt}{finish.text}" if full_text else finish.text
        if asked.details:
            event["details"] = {
                "finish_reason": finish.reason.value,
                "generated_tokens": finish.generated,
                "seed": asked.seed,
                "input_length": finish.prompt_length,
            }
    return orjson.dumps(event)


def error_reply(error: InflightError) -> tuple[int, bytes, list[Header]]:
    """Status, body and further headers of an error outside of a stream."""
    if isinstance(error, PlainError):
        return error.status, str(error).encode(), [(b"content-type", b"text/plain; charset=utf-8")]
    status, kind, text = classify(error)
    return status, orjson.dumps({"error": text, "error_type": kind}), [JSON, *error_headers(error)]


def refusal(error: InflightError) -> Refusal:
    """An error as one response."""
    status, body, headers = error_reply(error)
    return Refusal(status, headers, body)


async def fail(send: Send, error: InflightError) -> None:
    """Answers with an error."""
    status, body, headers = error_reply(error)
    await respond(send, body, status=status, content_type=headers[0], headers=headers[1:])


def error_frame(error: InflightError) -> bytes:
    _, kind, text = classify(error)
    return orjson.dumps({"error": text, "error_type": kind})


def classify(error: InflightError) -> tuple[int, str, str]:
    """Status, `error_type` and text."""
    text = str(error)
    if isinstance(error, Overloaded):
        return 429, "overloaded", "Model is overloaded"
    if isinstance(error, TemplateError):
        return 422, "template_error", f"Template error: {text}"
    if isinstance(error, TooLarge):
        return 413, "validation", text
    if isinstance(error, NotFound):
        return 404, "validation", text
    if isinstance(error, MethodNotAllowed):
        return 405, "validation", text
    if isinstance(error, InvalidRequest):
        return 422, "validation", f"Input validation error: {text}"
    if isinstance(error, Unavailable):
        return 503, "unavailable", text
    if isinstance(error, DeadlineExceeded):
        return 504, "timeout", text
    if isinstance(error, Cancelled):
        return 499, "cancelled", text
    return 424, "generation", f"Request failed during generation: {text}"
