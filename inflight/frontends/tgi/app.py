"""TGI's routes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from inflight.contract import Finish, Generator, PieceOfText, Token
from inflight.errors import InflightError
from inflight.frontends.door import FirstModelDoor
from inflight.frontends.llm import (
    CLIENT_BATCH,
    PlainError,
    all_of,
    draw_seed,
    pick,
    respond_health,
    warning_headers,
    with_seed,
)
from inflight.frontends.openai import ChatBody, Tokenized, TokenizeFields, chat_prompt, tokenized
from inflight.frontends.routes import Access, Call, Events, Plain, Route, generation
from inflight.frontends.tgi.answers import ChatTokenized, GenerateAnswer, Info, Piece, TgiError
from inflight.frontends.tgi.request import Asked, GenerateBody, check
from inflight.frontends.tgi.response import compute_type, error_frame, frame, generation_json, refusal, timing_headers
from inflight.version import __version__
from inflight.wire import EventStream, Opened, Refusal, Send, respond_json


class TokenizeBody(TokenizeFields, kw_only=True):
    """`POST /tokenize`: `inputs` is TGI's form, the other fields are vLLM's."""

    inputs: str | None = None


class TgiRest(FirstModelDoor):
    """Answers TGI's own routes with the first language model served here."""

    name = "Text Generation Inference"
    error = TgiError

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)

    async def _compatible(self, call: Call) -> None:
        """Answers the route of TGI's first API: with a list of one, or with a stream if the body asks for it."""
        body: GenerateBody = call.body()
        if body.stream:
            await self._streamed(call, body, full_text=True)
        else:
            await self._answered(call, body, full_text=True, listed=True)

    async def _generate(self, call: Call) -> None:
        await self._answered(call, call.body())

    async def _stream(self, call: Call) -> None:
        await self._streamed(call, call.body())

    async def _answered(self, call: Call, body: GenerateBody, *, full_text: bool = False, listed: bool = False) -> None:
        began = time.perf_counter()
        generator = self._generator
        asked = check(body, generator.info, streaming=False)
        full = full_text if asked.full_text is None else asked.full_text
        requests = [asked.request]
        requests += [with_seed(asked.request, draw_seed()) for _ in range(asked.best_of - 1)]
        validation = time.perf_counter() - began
        results = await call.run(all_of(generator, requests))
        answer = generation_json(asked, results, full)
        total = time.perf_counter() - began
        headers = timing_headers(generator.info, body.inputs, results[0], validation, total)
        headers += warning_headers(results[0].start)
        await respond_json(call.send, [answer] if listed else answer, headers=headers)

    async def _streamed(self, call: Call, body: GenerateBody, *, full_text: bool = False) -> None:
        generator = self._generator
        asked = check(body, generator.info, streaming=True)
        full = full_text if asked.full_text is None else asked.full_text
        await call.run(_run_stream(generator, asked, body, full, call.send))

    async def _tokenize(self, call: Call) -> None:
        body: TokenizeBody = call.body()
        special = body.add_special_tokens
        if body.inputs is not None:
            await respond_json(call.send, _listed(await self._generator.tokenize(body.inputs, special is not False)))
            return
        generator, chat = pick(self._backend, body.model), body.chat()
        if chat is not None:
            pieces = await generator.tokenize((await chat_prompt(generator, chat)).text, bool(special))
        elif body.prompt is not None:
            pieces = await generator.tokenize(body.prompt, special is not False)
        else:
            raise PlainError(
                422,
                "Failed to deserialize the JSON body into the target type: Object missing required field `inputs` "
                "(or, in vLLM's form, `prompt` or `messages`)",
            )
        await respond_json(call.send, tokenized(generator, pieces, bool(body.return_token_strs)))

    async def _chat_tokenize(self, call: Call) -> None:
        """Answers with the prompt that `/v1/chat/completions` makes of the same body."""
        body: ChatBody = call.body()
        generator = pick(self._backend, body.model)
        text = (await chat_prompt(generator, body)).text
        pieces = await generator.tokenize(text, add_special_tokens=False)
        if body.truncate is not None and body.truncate > 0:
            pieces = pieces[-body.truncate :]
        answer: ChatTokenized = {"tokenize_response": _listed(pieces), "templated_text": text}
        await respond_json(call.send, answer)

    async def _info(self, call: Call) -> None:
        await respond_json(call.send, _info(self._generator))

    async def _health(self, call: Call) -> None:
        await respond_health(call.send, self._backend.ready, "healthcheck")

    routes: ClassVar[Sequence[Route]] = (
        generation(
            "/",
            "Generate; a list of one, or a stream",
            _compatible,
            GenerateBody,
            list[GenerateAnswer],
            events=Events.ASKED,
        ),
        generation("/generate", "Generate", _generate, GenerateBody, GenerateAnswer),
        generation("/generate_stream", "Generate, token by token", _stream, GenerateBody, events=Events.ALWAYS),
        Route(
            "POST",
            "/tokenize",
            "Tokens of a text",
            _tokenize,
            TokenizeBody,
            answer=list[Piece] | Tokenized,
            access=Access.KEY,
            language=True,
        ),
        Route(
            "POST",
            "/chat_tokenize",
            "Tokens of a chat",
            _chat_tokenize,
            ChatBody,
            answer=ChatTokenized,
            language=True,  # open to all, as in TGI
        ),
        Route("GET", "/info", "The model and its limits", _info, answer=Info, language=True),
        Route("GET", "/health", "Whether everything can answer", _health, answer=Plain(""), also={503: TgiError}),
        Route("GET", "/ping", "The same", _health, answer=Plain(""), also={503: TgiError}),
    )


def _listed(pieces: Sequence[PieceOfText]) -> list[Piece]:
    return [{"id": one.id, "text": one.text, "start": one.start, "stop": one.stop} for one in pieces]


def _info(generator: Generator) -> Info:
    info = generator.info
    limits, policy = info.limits, info.policy
    return {
        "model_id": info.model_id,
        "model_sha": info.commit,
        "model_dtype": f"torch.{info.dtype}",
        "model_device_type": info.device_type,
        "model_pipeline_tag": "text-generation" if info.image_placeholder is None else "image-text-to-text",
        "max_concurrent_requests": policy.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "max_batch_total_tokens": policy.max_batch_total_tokens,
        "max_batch_prefill_tokens": policy.max_batch_prefill_tokens,
        "waiting_served_ratio": policy.waiting_served_ratio,
        "max_waiting_tokens": policy.max_waiting_tokens,
        "validation_workers": 1,
        "max_client_batch_size": limits.max_client_batch_size or CLIENT_BATCH,
        "router": "inflight",
        # Clients compare this with versions of TGI; the interface is that of 3.3.
        "version": f"3.3.6+inflight.{__version__}",
        "sha": None,
        "docker_label": None,
    }


async def _run_stream(generator: Generator, asked: Asked, body: GenerateBody, full: bool, send: Send) -> None:
    opened = await Opened(generator.generate(asked.request)).open()
    headers = [
        compute_type(generator.info),
        (b"x-compute-characters", str(len(body.inputs)).encode()),
        (b"x-accel-buffering", b"no"),
        *warning_headers(opened.first),
    ]
    try:
        async with EventStream(send, headers) as stream:
            try:
                index = 0
                last: Token | None = None
                async for event in opened:
                    if isinstance(event, Token):
                        index += 1
                        if event.last:
                            last = event
                        else:
                            await stream.event(frame(index, event, asked, None, full))
                    elif isinstance(event, Finish) and last is not None:
                        await stream.event(frame(index, last, asked, event, full))
            except InflightError as error:
                await stream.event(error_frame(error))
    finally:
        await opened.close()
