"""Errors of OpenAI's routes: in OpenAI's form, or in TGI's where its launcher started the server."""

from __future__ import annotations

import re
from typing import Any

import orjson

from inflight.errors import InflightError, InvalidRequest, TooLong
from inflight.frontends.llm import PlainError
from inflight.frontends.openai.answers import OpenAiError
from inflight.wire import JSON, Refusal

_NAMED = re.compile(r"at `\$\.([^`]+)`|missing required field `(\w+)`|^`([\w.\[\]]+)`")
"""The field that an error is about: msgspec has two ways to name it, and our own texts begin with it."""

_NAMES = {"max_new_tokens": "max_tokens", "inputs": None}
"""Fields that these routes have under another name, or not at all."""


def error_json(error: InflightError) -> bytes:
    """An error in OpenAI's form, with the fields that TGI's clients read."""
    status, kind, code = error.openai
    told: OpenAiError = {
        "error": {
            "message": _text(error),
            "type": kind,
            "param": _param(error),
            "code": code,
            "http_status_code": status,
        },
        "error_type": error.failure,  # the field that TGI's clients read
    }
    return orjson.dumps(told)


def refusal(error: InflightError, tgi: bool = False) -> Refusal:
    """An error as one response. Args: tgi: as TGI answers on these routes."""
    if not tgi:
        return Refusal(error.openai.status, [JSON, *error.headers], error_json(error))
    if isinstance(error, PlainError):
        return Refusal(error.tgi.status, [(b"content-type", b"text/plain; charset=utf-8")], str(error).encode())
    told: dict[str, Any] = {"error": error.tgi.text.format(error), "error_type": error.tgi.error_type}
    return Refusal(error.tgi.status, [JSON, *error.headers], orjson.dumps(told))


def _text(error: InflightError) -> str:
    """The text; of a request that is too long with the numbers in the words that clients search for."""
    if not isinstance(error, TooLong) or error.limit is None:
        return str(error)
    least = f"This model's maximum context length is {error.limit} tokens. However, "
    if error.new is None:
        return f"{least}your prompt has {error.given}. Please shorten it."
    assert isinstance(error.given, int)
    return (
        f"{least}you requested {error.given + error.new} tokens ({error.given} in the prompt, {error.new} in the "
        "completion). Please shorten the prompt or the completion."
    )


def _param(error: InflightError) -> str | None:
    """The field of the request that is wrong, as far as the text names it."""
    if isinstance(error, TooLong):
        return "messages" if error.new is None else "max_tokens"
    if not isinstance(error, (InvalidRequest, PlainError)):
        return "model" if error.openai.code == "model_not_found" else None
    found = _NAMED.search(str(error))
    name = next((each for each in found.groups() if each), None) if found is not None else None
    return _NAMES.get(name, name) if name is not None else None
