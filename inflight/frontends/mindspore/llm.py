"""The language-model routes of MindSpore Serving 2.1: `/models/<name>[/generate|/generate_stream]` and `/serving/...`.

There the names were fixed in the code; here any model that is served answers to its own, and the only one to any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import orjson

from inflight.errors import InflightError, InvalidRequest, NotFound, Unavailable
from inflight.frontends.base import Backend
from inflight.frontends.generate import MAX_SEED, Whole, draw_seed, number, pick, read_struct, whole
from inflight.frontends.routes import NoSuchRoute, check_verb
from inflight.frontends.tgi import fail, refusal
from inflight.generation import Finish, FinishReason, GenerationRequest, Generator, Token, TokenInfo
from inflight.log import LOGGER
from inflight.plan import Sampling
from inflight.wire import (
    Disconnected,
    EventStream,
    Gate,
    Gates,
    Opened,
    Receive,
    Scope,
    Send,
    respond_json,
    run_until_disconnect,
)

REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "eos", FinishReason.STOP: "stop"}
RETRY = 30000
"""Milliseconds that every event names."""
_KINDS = ("generate", "generate_stream")


class Parameters(msgspec.Struct):
    """`parameters`, with that server's own defaults. What it took and ignored (`stop`, `seed`) works here."""

    do_sample: bool = True
    repetition_penalty: float | None = 1.0
    temperature: float | None = 1.0
    top_k: int | None = 3
    top_p: float | None = 1.0
    typical_p: float | None = 1.0
    max_new_tokens: int | None = 300
    return_full_text: bool | None = True
    return_protocol: str | None = "sse"
    decoder_input_details: bool = False
    details: bool = False
    seed: int | None = 0
    stop: list[str] | None = None
    top_n_tokens: int | None = 0
    truncate: int | None = None
    watermark: bool = False


class Body(msgspec.Struct):
    """A request."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


class MindSporeLlm:
    """Answers those routes.

    Attributes:
        paths: the verbs of those whose whole path is fixed.
    """

    paths: ClassVar[Mapping[str, Sequence[str]]] = {
        "/serving/get_bs": ("GET",),
        "/serving/get_request_numbers": ("GET",),
        "/serving/get_serverd_model_info": ("GET",),
    }

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._gates = Gates(refusal)

    def gate(self, scope: Scope) -> Gate | None:
        """Where its generations have to pass."""
        if scope["method"] != "POST":
            return None
        try:
            return self._gates.of(pick(self._backend, scope["path"].split("/")[2]))
        except (NotFound, Unavailable):  # the door itself says so
            return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for one of `paths`, or for any path under `/models/`."""
        path: str = scope["path"]
        try:
            if path in self.paths:
                await self._about(path.rpartition("_")[2], send)
                return
            _, _, name, *rest = path.split("/")
            if len(rest) > 1 or (rest and rest[0] not in _KINDS):
                raise NoSuchRoute(f"there is no route {path}; use /models/{name}[/generate|/generate_stream]")
            check_verb(scope, "POST")
            generator = pick(self._backend, name)
            body = await read_struct(scope, receive, Body, generator.info.limits.payload_limit, any_type=True)
            given = body.parameters or Parameters()
            request = _request(body, given, generator)
            if rest == ["generate_stream"] or (not rest and body.stream):
                await run_until_disconnect(_stream(generator, request, given, send), receive)
            else:
                result = await run_until_disconnect(whole(generator, request), receive)
                await respond_json(send, _full(result, given))
        except Disconnected:
            return
        except InflightError as error:
            await fail(send, error)
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            LOGGER.error("%s failed", scope["path"], exc_info=error)
            await fail(send, InflightError("internal server error, the server's log has the details"))

    async def _about(self, what: str, send: Send) -> None:
        """`bs`: rows of the batch; `numbers`: requests in the server; `info`: the model. Each as one event."""
        generator = pick(self._backend)
        info = generator.info
        found: Any = {
            "bs": info.policy.max_batch_size,
            "numbers": generator.streams,
            "info": {
                "model_name": info.name,
                "model_id": info.model_id,
                "batch_size": info.policy.max_batch_size,
                "seq_length": info.limits.max_total_tokens,
            },
        }[what]
        async with EventStream(send) as stream:
            await stream.event(orjson.dumps({"event": "message", "retry": RETRY, "data": found}))


def _request(body: Body, given: Parameters, generator: Generator) -> GenerationRequest:
    """That server repaired values out of range instead of refusing them."""
    limits = generator.info.limits
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    if given.max_new_tokens is not None and given.max_new_tokens < 1:
        raise InvalidRequest("`max_new_tokens` must be strictly positive")
    if given.truncate is not None and not 0 < given.truncate <= limits.max_input_tokens:
        raise InvalidRequest(f"`truncate` must be strictly positive and less than {limits.max_input_tokens}")
    warm = given.temperature is None or given.temperature > 0
    top_k = 3 if given.top_k is None else given.top_k
    top_p = 1.0 if given.top_p is None else min(1.0, max(0.01, given.top_p))
    sampling = Sampling(
        do_sample=given.do_sample and warm,
        temperature=given.temperature if given.temperature is not None and warm else 1.0,
        top_k=top_k if 0 < top_k < 1 << 31 else 1,
        top_p=top_p,
        typical_p=given.typical_p if given.typical_p is not None and 0 < given.typical_p < 1 else 1.0,
        repetition_penalty=given.repetition_penalty
        if given.repetition_penalty and given.repetition_penalty > 0
        else 1.0,
        seed=(given.seed or draw_seed()) & MAX_SEED,
        logprobs=True,
        top_n_tokens=min(max(given.top_n_tokens or 0, 0), limits.max_top_n_tokens),
        prompt_logprobs=given.decoder_input_details,
        watermark=given.watermark,
    )
    return GenerationRequest(
        body.inputs,
        sampling,
        given.max_new_tokens,
        stop=tuple(given.stop or ()),
        truncate=given.truncate,
        prompt_tokens=given.decoder_input_details,
        # Scripts were written for sequences that were padded to one length: what does not fit is cut there.
        fit=True,
    )


def _token(info: TokenInfo) -> dict[str, Any]:
    return {"id": info.id, "logprob": number(info.logprob), "special": info.special, "text": info.text}


def _full(result: Whole, given: Parameters) -> dict[str, Any]:
    return {
        "generated_text": result.finish.text,
        "finish_reason": REASONS[result.finish.reason],
        "generated_tokens": result.finish.generated,
        "prefill": [
            {"id": info.id, "logprob": number(info.logprob), "text": info.text} for info in result.start.prompt
        ],
        "seed": given.seed or 0,
        "tokens": [_token(token.info) for token in result.tokens],
        "top_tokens": [[_token(info) for info in token.top] for token in result.tokens],
        "details": None,
    }


async def _stream(generator: Generator, request: GenerationRequest, given: Parameters, send: Send) -> None:
    """One event a token; the last one has the whole text where `return_full_text`."""
    opened = await Opened(generator.generate(request)).open()
    plain = (given.return_protocol or "sse") != "sse"
    last: Token | None = None
    try:
        async with EventStream(send) as stream:

            async def tell(data: dict[str, Any]) -> None:
                if plain:
                    await stream.event(orjson.dumps(data), b"data:")
                else:
                    await stream.event(orjson.dumps({"event": "message", "retry": RETRY, "data": [data]}))

            try:
                async for event in opened:
                    if isinstance(event, Token):
                        if event.last:
                            last = event
                        else:
                            await tell({**_token(event.info), "generated_text": None, "finish_reason": None})
                    elif isinstance(event, Finish) and last is not None:
                        text = event.text if given.return_full_text is not False else None
                        reason = REASONS[event.reason]
                        count = event.generated
                        data = {"generated_text": text, "finish_reason": reason, "generated_tokens": count}
                        await tell({**_token(last.info), **data})
            except InflightError as error:
                await tell({"error": str(error), "finish_reason": "predict_failed"})
    finally:
        await opened.close()
