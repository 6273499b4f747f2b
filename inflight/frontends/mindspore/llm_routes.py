"""The language-model routes of MindSpore Serving 2.1: `/models/<name>[/generate|/generate_stream]` and `/serving/...`.

MindSpore Serving fixed the names in its code. Here each model has its own name; if only one is served, any name works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict, TypeVar

import msgspec
import orjson

from inflight.contract import (
    RANGES,
    Finish,
    FinishReason,
    GenerationRequest,
    Generator,
    Sampling,
    Token,
    TokenInfo,
    Whole,
    from_markdown,
    whole,
    with_images,
)
from inflight.errors import InflightError, InvalidRequest, NotFound, Unavailable
from inflight.frontends.images import KEYS, split_images
from inflight.frontends.llm import MAX_SEED, draw_seed, number, pick
from inflight.frontends.routes import Call, Events, Route, generation
from inflight.frontends.tgi import TgiDoor
from inflight.wire import EventStream, Gate, Opened, Send, respond_json

Number = TypeVar("Number", int, float)

REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "eos", FinishReason.STOP: "stop"}
RETRY = 30000
"""Milliseconds: the field `retry` of every event."""


class LlmParameters(msgspec.Struct):
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


class LlmBody(msgspec.Struct):
    """A request."""

    inputs: str = ""
    parameters: LlmParameters | None = None
    stream: bool = False
    image: Any = None
    images: Any = None
    image_url: Any = None


class _Told(TypedDict):
    id: int
    logprob: float | None
    special: bool
    text: str


class LlmAnswer(TypedDict):
    """A whole answer."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    prefill: list[dict[str, Any]]
    seed: int
    tokens: list[_Told]
    top_tokens: list[list[_Told]]
    details: None


class LlmRoutes(TgiDoor):
    """Answers those routes."""

    name = "MindSpore Serving"
    below = ("/models/",)
    any_type = True

    def limit(self, call: Call) -> int:
        return pick(self._backend, call.names["name"]).info.limits.payload_limit

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        try:
            return self._gates.of(pick(self._backend, names["name"]))
        except (NotFound, Unavailable):  # the route's handler reports it
            return None

    async def _either(self, call: Call) -> None:
        body: LlmBody = call.body()
        await (self._streamed if body.stream else self._whole)(call, body)

    async def _generate(self, call: Call) -> None:
        await self._whole(call, call.body())

    async def _stream(self, call: Call) -> None:
        await self._streamed(call, call.body())

    async def _whole(self, call: Call, body: LlmBody) -> None:
        given = body.parameters or LlmParameters()
        generator = pick(self._backend, call.names["name"])
        result = await call.run(whole(generator, await _request(body, given, generator)))
        await respond_json(call.send, _full(result, given))

    async def _streamed(self, call: Call, body: LlmBody) -> None:
        given = body.parameters or LlmParameters()
        generator = pick(self._backend, call.names["name"])
        await call.run(_stream(generator, await _request(body, given, generator), given, call.send))

    async def _rows(self, call: Call) -> None:
        await _tell(call, pick(self._backend).info.policy.max_batch_size)

    async def _requests(self, call: Call) -> None:
        await _tell(call, pick(self._backend).streams)

    async def _model(self, call: Call) -> None:
        info = pick(self._backend).info
        found = {
            "model_name": info.name,
            "model_id": info.model_id,
            "batch_size": info.policy.max_batch_size,
            "seq_length": info.limits.max_total_tokens,
        }
        await _tell(call, found)

    routes: ClassVar[Sequence[Route]] = (
        generation(
            "/models/{name}",
            "Generate (2.1); whole, or a stream where the body asks for it",
            _either,
            LlmBody,
            LlmAnswer,
            events=Events.ASKED,
        ),
        generation("/models/{name}/generate", "Generate (2.1)", _generate, LlmBody, LlmAnswer),
        generation(
            "/models/{name}/generate_stream", "Generate (2.1), token by token", _stream, LlmBody, events=Events.ALWAYS
        ),
        Route("GET", "/serving/get_bs", "Rows of the batch", _rows, events=Events.ALWAYS, language=True),
        Route(
            "GET",
            "/serving/get_request_numbers",
            "Requests in the server",
            _requests,
            events=Events.ALWAYS,
            language=True,
        ),
        Route("GET", "/serving/get_serverd_model_info", "The model", _model, events=Events.ALWAYS, language=True),
    )


async def _tell(call: Call, data: Any) -> None:
    """Answers with a single event."""
    async with EventStream(call.send) as stream:
        await stream.event(orjson.dumps({"event": "message", "retry": RETRY, "data": data}))


async def _request(body: LlmBody, given: LlmParameters, generator: Generator) -> GenerationRequest:
    """The request of a body. As in MindSpore Serving, values out of range are repaired instead of refused."""
    limits = generator.info.limits
    given_images = {name: value for name in KEYS if (value := getattr(body, name)) is not None}
    _, media = split_images(given_images, "the request", generator.info)
    prompt, in_text = from_markdown(body.inputs, generator.info)
    if media and in_text:
        raise InvalidRequest("the request has images by keys and as ![](...) in its text; not both are possible")
    if not body.inputs and not media:
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
        top_k=_repaired("top_k", top_k or None, 1),
        top_p=top_p,
        typical_p=_repaired("typical_p", given.typical_p, 1.0),
        repetition_penalty=_repaired("repetition_penalty", given.repetition_penalty, 1.0),
        seed=(given.seed or draw_seed()) & MAX_SEED,
        logprobs=True,
        top_n_tokens=min(max(given.top_n_tokens or 0, 0), limits.max_top_n_tokens),
        prompt_logprobs=given.decoder_input_details,
        watermark=given.watermark,
    )
    request = GenerationRequest(
        prompt,
        sampling,
        given.max_new_tokens,
        stop=tuple(given.stop or ()),
        truncate=given.truncate,
        prompt_tokens=given.decoder_input_details,
        # Scripts were written for sequences padded to one length, where a text that does not fit was cut.
        fit=True,
        media=in_text,
    )
    return await with_images(generator, request, media)


def _repaired(name: str, value: Number | None, otherwise: Number) -> Number:
    return value if value is not None and RANGES[name].holds(value) else otherwise


def _token(info: TokenInfo) -> _Told:
    return {"id": info.id, "logprob": number(info.logprob), "special": info.special, "text": info.text}


def _full(result: Whole, given: LlmParameters) -> LlmAnswer:
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


async def _stream(generator: Generator, request: GenerationRequest, given: LlmParameters, send: Send) -> None:
    """Sends an event for every token; the last one has the whole text unless `return_full_text` is false."""
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
