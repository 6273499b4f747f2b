"""Functions that the language-model doors share: bodies, whole answers, the choice of a model."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from inflight.contract import Embedding, GenerationRequest, Generator, Start, Whole, together, whole
from inflight.errors import Anthropic, InflightError, Loading, NotFound, OpenAi, Tgi
from inflight.frontends.base import Backend
from inflight.wire import MESSAGE_OPTION, Body, Header, Receive, Scope, Send, header, read_body, respond, respond_json

T = TypeVar("T")

MAX_SEED = (1 << 64) - 1

CLIENT_BATCH = 4
"""TGI's limit of the prompts in one request: it binds behind TGI's launcher, and is told to TGI's clients."""

WARNING = b"x-inflight-warning"
"""The header of an answer whose grammar does not hold all that the request's schemas say."""
MAX_WARNING = 1000
"""Most characters of it."""


def warning_headers(event: object) -> list[Header]:
    """The header with the warnings of a generation's first event; none where there are none."""
    if not isinstance(event, Start) or not event.warnings:
        return []
    text = "; ".join(event.warnings).encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return [(WARNING, text[:MAX_WARNING].encode())]


class PlainError(InflightError):
    """The body does not have the right form. Answered in plain text, as by TGI's web framework."""

    failure = "validation"

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.http_status = status
        self.tgi = Tgi(status, "validation")
        self.openai = OpenAi(400 if status == 422 else status, "invalid_request_error")
        self.anthropic = Anthropic(400, "invalid_request_error")


async def read_struct(
    scope: Scope,
    receive: Receive,
    form: type[T],
    limit: int,
    option: str = MESSAGE_OPTION,
    *,
    any_type: bool = False,
    whole_floats: bool = False,
) -> T:
    """Reads the body as a struct.

    Args:
        limit, option: as for `read_body`.
        any_type: read JSON whatever the content type.
        whole_floats: fields that hold whole numbers may be written as `3.0`.

    Raises:
        PlainError: 415 another content type, 400 broken JSON, 422 JSON of another form.
        TooLarge, Disconnected: as `read_body`.
    """
    if not (any_type or _says_json(scope)):
        raise PlainError(415, "Expected request with `Content-Type: application/json`")
    body = await read_body(scope, receive, limit, option)
    try:
        return _decoded(body, form, whole_floats)
    except msgspec.ValidationError as error:
        raise PlainError(422, f"Failed to deserialize the JSON body into the target type: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlainError(400, f"Failed to parse the request body as JSON: {error}") from error


def _decoded(body: Body, form: type[T], whole_floats: bool) -> T:
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError:
        given = msgspec.json.decode(body) if whole_floats else None
        if not isinstance(given, dict):
            raise
        whole = [name for name, value in given.items() if _is_whole(value)]
        if not whole:
            raise
        return msgspec.convert({**given, **{name: int(given[name]) for name in whole}}, form)


def _is_whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _says_json(scope: Scope) -> bool:
    kind = header(scope, b"content-type") or b""
    essence = kind.partition(b";")[0].strip().lower()
    return essence == b"application/json" or (essence.startswith(b"application/") and essence.endswith(b"+json"))


async def all_of(generator: Generator, requests: Sequence[GenerationRequest]) -> list[Whole]:
    """Runs several generations at the same time; the first failure ends the others.

    Raises:
        InflightError: the first failure.
    """
    if len(requests) == 1:
        return [await whole(generator, requests[0])]
    return await together(whole(generator, request) for request in requests)


def embedding_of(one: Whole) -> Embedding:
    """The vector of a request with `embed`."""
    data = one.finish.embedding
    if data is None:
        raise InflightError("the model gave no embedding")
    return Embedding(struct.unpack(f"<{len(data) // 4}f", data), one.finish.prompt_length)


def pick(backend: Backend, name: str | None = None) -> Generator:
    """The model with that name or id; without a name the first. If one model is served, any name is accepted, because
    clients invent names.

    Raises:
        NotFound: no model is served, or several and none has that name, or the model was unloaded.
        Loading: the model is not loaded yet, or a servable that may declare it is not.
    """
    generators = backend.generators
    if not generators:
        if any(not status.loaded for status in backend.servables()):
            raise Loading("the models here are still being loaded; try again later")
        raise NotFound("no language model is served here")
    return loaded(_named(generators, name, backend.unloaded))


def loaded(generator: Generator) -> Generator:
    """Returns the model.

    Raises:
        Loading: it is not loaded yet.
    """
    if not generator.info.loaded:
        raise Loading(f"the model '{generator.info.name}' is still being loaded; try again later")
    return generator


def _named(generators: Mapping[str, Generator], name: str | None, gone: Collection[str]) -> Generator:
    if name is not None:
        if name in generators:
            return generators[name]
        for generator in generators.values():
            if generator.info.model_id == name or name in generator.info.adapters:
                return generator
    if name is None or (len(generators) == 1 and name not in gone):
        return next(iter(generators.values()))
    raise NotFound(f"The model `{name}` does not exist. Served here: {', '.join(generators)}")


def payload_limit(backend: Backend) -> int:
    """The largest body in bytes, on a route whose body may name any of the models.

    Raises:
        NotFound, Loading: no model can answer, as in `pick`.
    """
    limits = [generator.info.limits.payload_limit for generator in backend.generators.values()]
    return max(limits) if limits else pick(backend).info.limits.payload_limit


def draw_seed() -> int:
    return random.getrandbits(64)


def with_seed(request: GenerationRequest, seed: int) -> GenerationRequest:
    sampling: Any = msgspec.structs.replace(request.sampling, seed=seed & MAX_SEED)
    return replace(request, sampling=sampling)


def number(value: float | None) -> float | None:
    """A log-probability for JSON, which has neither NaN nor infinity: those are None."""
    return value if value is not None and math.isfinite(value) else None


async def respond_health(send: Send, ready: bool, error_type: str) -> None:
    """Answers `/health` as TGI and TEI do. Args: error_type: of the error where the server is not ready."""
    if ready:
        await respond(send, b"", content_type=(b"content-type", b"text/plain; charset=utf-8"))
    else:
        await respond_json(send, {"error": "unhealthy", "error_type": error_type}, status=503)
