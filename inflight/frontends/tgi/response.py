"""TGI's answers: bodies, headers, frames, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from inflight.contract import Finish, GeneratorInfo, Token, TokenInfo, Whole
from inflight.errors import InflightError
from inflight.frontends.llm import PlainError, number
from inflight.frontends.tgi.answers import Details, GenerateAnswer, TgiError, TokenAnswer
from inflight.frontends.tgi.request import Asked
from inflight.wire import JSON, Header, Refusal


def compute_type(info: GeneratorInfo) -> Header:
    """The header x-compute-type: `<count>-<device>`, or the configured text."""
    return (b"x-compute-type", (info.compute_type or f"{info.world_size}-{info.device_type}").encode())


def token_json(info: TokenInfo) -> TokenAnswer:
    return {"id": info.id, "text": info.text, "logprob": number(info.logprob), "special": info.special}


def generation_json(asked: Asked, results: Sequence[Whole], full_text: bool) -> GenerateAnswer:
    """The answer to a request with several generations: the most likely one."""
    winner = max(results, key=lambda one: one.mean_logprob)
    answer: GenerateAnswer = {"generated_text": _text(asked, winner, full_text)}
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
    return f"{asked.inputs}{one.finish.text}" if full_text else one.finish.text


def _details(asked: Asked, one: Whole) -> Details:
    details: Details = {
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
    """The headers that TGI adds to a whole answer; times in milliseconds, `x-compute-time` in seconds."""
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
    """One event of a stream; the last token's event also holds the whole text."""
    event: dict[str, Any] = {"index": index, "token": token_json(token.info)}
    if asked.request.sampling.top_n_tokens:
        event["top_tokens"] = [token_json(info) for info in token.top]
    event["generated_text"] = None
    event["details"] = None
    if finish is not None:
        event["generated_text"] = f"{asked.inputs}{finish.text}" if full_text else finish.text
        if asked.details:
            event["details"] = {
                "finish_reason": finish.reason.value,
                "generated_tokens": finish.generated,
                "seed": asked.seed,
                "input_length": finish.prompt_length,
            }
    return orjson.dumps(event)


def refusal(error: InflightError) -> Refusal:
    """An error as one response."""
    if isinstance(error, PlainError):
        return Refusal(error.tgi.status, [(b"content-type", b"text/plain; charset=utf-8")], str(error).encode())
    return Refusal(error.tgi.status, [JSON, *error.headers], error_frame(error))


def error_frame(error: InflightError) -> bytes:
    """An error as JSON, also within a stream."""
    told: TgiError = {"error": error.tgi.text.format(error), "error_type": error.tgi.error_type}
    return orjson.dumps(told)
