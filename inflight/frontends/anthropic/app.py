"""Anthropic's routes: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from inflight.contract import GenerationRequest, Generator, whole
from inflight.errors import InflightError
from inflight.frontends.anthropic.answers import Counted, MessageAnswer, MessagesError, ModelAnswer, ModelsAnswer
from inflight.frontends.anthropic.request import CountBody, MessagesBody, chat_body
from inflight.frontends.anthropic.response import PING, MessageReply, error_json, refusal, request_id
from inflight.frontends.door import NamedModelDoor
from inflight.frontends.llm import pick, warning_headers
from inflight.frontends.openai import ChatPrompt, chat_prompt, requests_of
from inflight.frontends.routes import Access, Call, Events, Route, generation
from inflight.frontends.served_models import MODELS, Served, asks_for_anthropics, served_model, served_models
from inflight.wire import EventStream, Opened, Refusal, Scope, Send, respond_json

MESSAGES = "/v1/messages"


class AnthropicRest(NamedModelDoor):
    """Answers Anthropic's clients with the language models served here."""

    name = "Anthropic"
    below = ("/v1/",)
    error = MessagesError
    any_type = True

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)

    def serves(self, scope: Scope) -> bool:
        """Of the paths that OpenAI has too: what a client of Anthropic's asks for."""
        return asks_for_anthropics(scope)

    async def _models(self, call: Call) -> None:
        """Lists the loaded models on one page, or describes one."""
        name = call.names.get("name", "")
        if name:
            await respond_json(call.send, _model(served_model(self._backend, name)), headers=[request_id()])
            return
        found = [_model(one) for one in served_models(self._backend)]
        answer: ModelsAnswer = {
            "data": found,
            "has_more": False,
            "first_id": found[0]["id"],
            "last_id": found[-1]["id"],
        }
        await respond_json(call.send, answer, headers=[request_id()])

    async def _messages(self, call: Call) -> None:
        body: MessagesBody = call.body()
        generator = pick(self._backend, body.model)
        request, prompt = await _prepared(generator, body)
        reader = prompt.tools.reader(prompt.text)
        hidden = (body.thinking or {}).get("display") == "omitted"
        reply = MessageReply(body.model or generator.info.model_id, reader, hidden=hidden)
        if body.stream:
            await call.run(_stream(generator, request, reply, call.send))
        else:
            one = await call.run(whole(generator, request))
            await respond_json(call.send, reply.whole(one), headers=[request_id(), *warning_headers(one.start)])

    async def _count(self, call: Call) -> None:
        """The length of the prompt. Only encoding an image tells how long it is, so with images the prompt is computed;
        the request that follows finds it in the caches."""
        body: CountBody = call.body()
        generator = pick(self._backend, body.model)
        request, _ = await _prepared(generator, body)
        if request.media:
            one = replace(request, max_new_tokens=1, grammar=None, thought=None)
            measured = await call.run(whole(generator, one))
            length = measured.start.prompt_length
        else:
            assert isinstance(request.prompt, str)
            length = len(await generator.tokenize(request.prompt, add_special_tokens=False))
        answer: Counted = {"input_tokens": length}
        await respond_json(call.send, answer, headers=[request_id()])

    routes: ClassVar[Sequence[Route]] = (
        generation(MESSAGES, "Chat, in Anthropic's form", _messages, MessagesBody, MessageAnswer, events=Events.ASKED),
        Route(
            "POST",
            f"{MESSAGES}/count_tokens",
            "Tokens of a chat in Anthropic's form",
            _count,
            CountBody,
            answer=Counted,
            access=Access.KEY,
            language=True,
        ),
        Route("GET", MODELS, "What is served, for Anthropic's clients", _models, answer=ModelsAnswer, language=True),
        Route(
            "GET",
            f"{MODELS}/{{name*}}",
            "One model, for Anthropic's clients",
            _models,
            answer=ModelAnswer,
            language=True,
        ),
    )


def _model(one: Served) -> ModelAnswer:
    limits = one.generator.info.limits
    return {
        "type": "model",
        "id": one.id,
        "display_name": one.id,
        "created_at": "1970-01-01T00:00:00Z",  # the epoch, where a date is not known
        "lifecycle": "active",
        "max_input_tokens": limits.max_input_tokens,
        "max_tokens": limits.max_total_tokens,
    }


async def _prepared(generator: Generator, body: CountBody) -> tuple[GenerationRequest, ChatPrompt]:
    """The request of a message; agents ask for more tokens than small models have, and get what there is."""
    chat = chat_body(body)
    prompt = await chat_prompt(generator, chat)
    (request,) = requests_of(
        chat, [prompt.text], generator.info, special=False, grammar=prompt.tools.grammar, media=prompt.media
    )
    thought = prompt.tools.thought(prompt.text, chat.thinking_token_budget)
    return replace(request, fit=True, thought=thought), prompt


async def _stream(generator: Generator, request: GenerationRequest, reply: MessageReply, send: Send) -> None:
    opened = await Opened(generator.generate(request)).open()
    try:
        headers = [(b"x-accel-buffering", b"no"), request_id(), *warning_headers(opened.first)]
        async with EventStream(send, headers, idle=_frame(*PING)) as stream:
            try:
                async for event in opened:
                    for kind, data in reply.events(event):
                        await stream.event(data, _mark(kind))
            except InflightError as error:
                await stream.event(error_json(error), _mark("error"))
    finally:
        await opened.close()


def _mark(kind: str) -> bytes:
    return f"event: {kind}\ndata: ".encode()


def _frame(kind: str, data: bytes) -> bytes:
    return _mark(kind) + data + b"\n\n"
