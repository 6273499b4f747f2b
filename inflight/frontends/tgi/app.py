"""TGI's routes as a raw ASGI application."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from inflight import __version__
from inflight.errors import InflightError
from inflight.frontends.base import Backend
from inflight.frontends.generate import all_of, draw_seed, pick, read_struct, with_seed
from inflight.frontends.openai import ChatBody, chat_prompt
from inflight.frontends.routes import verb_of
from inflight.frontends.tgi.request import Asked, GenerateBody, check
from inflight.frontends.tgi.response import (
    compute_type,
    error_frame,
    fail,
    frame,
    generation_json,
    refusal,
    timing_headers,
)
from inflight.generation import Finish, Generator, Token
from inflight.log import LOGGER
from inflight.wire import (
    Disconnected,
    EventStream,
    Gate,
    Gates,
    Opened,
    Receive,
    Scope,
    Send,
    respond,
    respond_json,
    run_until_disconnect,
)

T = TypeVar("T")

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
_GENERATING = ("/", "/generate", "/generate_stream")


class TokenizeBody(msgspec.Struct):
    """`POST /tokenize`."""

    inputs: str
    add_special_tokens: bool = True


class TgiRest:
    """Answers TGI's own routes with the first language model served here.

    Attributes:
        paths: which handler answers which path, by verb.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._gates = Gates(refusal)
        self.paths: Mapping[str, Mapping[str, Handler]] = {
            "/": {"POST": self._compatible},
            "/generate": {"POST": self._generate},
            "/generate_stream": {"POST": self._stream},
            "/tokenize": {"POST": self._tokenize},
            "/chat_tokenize": {"POST": self._chat_tokenize},
            "/info": {"GET": self._info},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health},
        }

    def gate(self, scope: Scope) -> Gate | None:
        """Where its generations have to pass."""
        generating = scope["method"] == "POST" and scope["path"] in _GENERATING
        return self._gates.of(next(iter(self._backend.generators.values()))) if generating else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for one of these routes."""
        try:
            await self.paths[scope["path"]][verb_of(scope)](scope, receive, send)
        except Disconnected:
            return
        except InflightError as error:
            await fail(send, error)
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            LOGGER.error("%s failed", scope["path"], exc_info=error)
            await fail(send, InflightError("internal server error, the server's log has the details"))

    @property
    def _generator(self) -> Generator:
        return pick(self._backend)

    async def _body(self, scope: Scope, receive: Receive, form: type[T]) -> T:
        """The request's body, where there is a model to answer it."""
        return await read_struct(scope, receive, form, self._generator.info.limits.payload_limit)

    async def _compatible(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The route of the first API: a list of one, or a stream where the body asks for it."""
        body = await self._body(scope, receive, GenerateBody)
        if body.stream:
            await self._streamed(body, receive, send, full_text=True)
        else:
            await self._answered(body, receive, send, full_text=True, listed=True)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answered(await self._body(scope, receive, GenerateBody), receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._streamed(await self._body(scope, receive, GenerateBody), receive, send)

    async def _answered(
        self, body: GenerateBody, receive: Receive, send: Send, *, full_text: bool = False, listed: bool = False
    ) -> None:
        began = time.perf_counter()
        generator = self._generator
        asked = check(body, generator.info.limits, streaming=False)
        full = full_text if asked.full_text is None else asked.full_text
        requests = [asked.request]
        requests += [with_seed(asked.request, draw_seed()) for _ in range(asked.best_of - 1)]
        validation = time.perf_counter() - began
        results = await run_until_disconnect(all_of(generator, requests), receive)
        answer = generation_json(asked, results, full)
        total = time.perf_counter() - began
        headers = timing_headers(generator.info, body.inputs, results[0], validation, total)
        await respond_json(send, [answer] if listed else answer, headers=headers)

    async def _streamed(self, body: GenerateBody, receive: Receive, send: Send, *, full_text: bool = False) -> None:
        generator = self._generator
        asked = check(body, generator.info.limits, streaming=True)
        full = full_text if asked.full_text is None else asked.full_text
        await run_until_disconnect(_run_stream(generator, asked, body, full, send), receive)

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive, TokenizeBody)
        pieces = await self._generator.tokenize(body.inputs, body.add_special_tokens)
        await respond_json(
            send, [{"id": one.id, "text": one.text, "start": one.start, "stop": one.stop} for one in pieces]
        )

    async def _chat_tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The very prompt that `/v1/chat/completions` makes of the same body."""
        body = await self._body(scope, receive, ChatBody)
        generator = pick(self._backend, body.model)
        _, text = await chat_prompt(generator, body)
        pieces = await generator.tokenize(text, add_special_tokens=False)
        if body.truncate is not None and body.truncate > 0:
            pieces = pieces[-body.truncate :]
        found = [{"id": one.id, "text": one.text, "start": one.start, "stop": one.stop} for one in pieces]
        await respond_json(send, {"tokenize_response": found, "templated_text": text})

    async def _info(self, scope: Scope, receive: Receive, send: Send) -> None:
        info = self._generator.info
        limits, policy = info.limits, info.policy
        await respond_json(
            send,
            {
                "model_id": info.model_id,
                "model_sha": info.commit,
                "model_dtype": f"torch.{info.dtype}",
                "model_device_type": info.device_type,
                "model_pipeline_tag": "text-generation",
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
                "max_client_batch_size": limits.max_client_batch_size,
                "router": "inflight",
                # Clients compare this with versions of TGI: the surface is that of 3.3.
                "version": f"3.3.6+inflight.{__version__}",
                "sha": None,
                "docker_label": None,
            },
        )

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._backend.ready:
            await respond(send, b"", content_type=(b"content-type", b"text/plain; charset=utf-8"))
        else:
            await respond_json(send, {"error": "unhealthy", "error_type": "healthcheck"}, status=503)


async def _run_stream(generator: Generator, asked: Asked, body: GenerateBody, full: bool, send: Send) -> None:
    opened = await Opened(generator.generate(asked.request)).open()
    headers = [
        compute_type(generator.info),
        (b"x-compute-characters", str(len(body.inputs)).encode()),
        (b"x-accel-buffering", b"no"),
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
