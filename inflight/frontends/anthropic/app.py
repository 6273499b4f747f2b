"""Anthropic's routes: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from inflight.contract import GenerationRequest, Generator, whole
from inflight.errors import InflightError
from inflight.frontends.anthropic.answers import Counted, MessageAnswer, MessagesError
from inflight.frontends.anthropic.reader import reader_of
from inflight.frontends.anthropic.request import CountBody, MessagesBody, chat_body
from inflight.frontends.anthropic.response import PING, MessageReply, error_json, refusal, request_id
from inflight.frontends.base import Backend
from inflight.frontends.door import Door
from inflight.frontends.llm import payload_limit, pick
from inflight.frontends.openai import ChatPrompt, chat_prompt, requests_of, thought_in
from inflight.frontends.routes import Access, Call, Events, Route, generation
from inflight.wire import PAYLOAD_OPTION, EventStream, Gate, Gates, Opened, Refusal, Send, respond_json

MESSAGES = "/v1/messages"


class AnthropicRest(Door):
    """Answers Anthropic's clients with the language models served here."""

    name = "Anthropic"
    error = MessagesError
    any_type = True
    size_option = PAYLOAD_OPTION

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._gates, self._gates_of_several = Gates(refusal), Gates(None)

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)

    def limit(self, call: Call) -> int:
        return payload_limit(self._backend)

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        """As of OpenAI's routes: the body names the model, where there are several."""
        first, *more = self._backend.generators.values()
        if not more:
            return self._gates.of(first)
        return self._gates_of_several.of(next((one for one in more if one.admission.full), first))

    async def _messages(self, call: Call) -> None:
        body: MessagesBody = call.body()
        generator = pick(self._backend, body.model)
        request, prompt = await _prepared(generator, body)
        reader = reader_of(prompt)
        hidden = (body.thinking or {}).get("display") == "omitted"
        reply = MessageReply(body.model or generator.info.model_id, reader, hidden=hidden)
        if body.stream:
            await call.run(_stream(generator, request, reply, call.send))
        else:
            answer = reply.whole(await call.run(whole(generator, request)))
            await respond_json(call.send, answer, headers=[request_id()])

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
    )


async def _prepared(generator: Generator, body: CountBody) -> tuple[GenerationRequest, ChatPrompt]:
    """The request of a message; agents ask for more tokens than small models have, and get what there is."""
    chat = chat_body(body)
    prompt = await chat_prompt(generator, chat)
    (request,) = requests_of(
        chat, [prompt.text], generator.info, special=False, grammar=prompt.tools.grammar, media=prompt.media
    )
    thought = thought_in(generator.info.answer, prompt.text, chat.thinking_token_budget)
    return replace(request, fit=True, thought=thought), prompt


async def _stream(generator: Generator, request: GenerationRequest, reply: MessageReply, send: Send) -> None:
    opened = await Opened(generator.generate(request)).open()
    try:
        headers = [(b"x-accel-buffering", b"no"), request_id()]
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
