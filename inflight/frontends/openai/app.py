"""OpenAI's routes: `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/embeddings` and `/v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import msgspec

from inflight.contract import (
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    Generator,
    Media,
    Start,
    Token,
    Whole,
    from_messages,
    in_turns,
    turn_of,
    whole,
)
from inflight.errors import InflightError, InvalidRequest, ToolError
from inflight.frontends.base import Backend
from inflight.frontends.control import Control
from inflight.frontends.door import NamedModelDoor
from inflight.frontends.llm import CLIENT_BATCH, embedding_of, pick, warning_headers
from inflight.frontends.openai.adapters import (
    LoadAdapterBody,
    UnloadAdapterBody,
    load_adapter,
    respond_plain,
    unload_adapter,
)
from inflight.frontends.openai.answers import (
    ChatAnswer,
    CompletionAnswer,
    EmbeddingsAnswer,
    ModelAnswer,
    ModelsAnswer,
    OpenAiError,
    ResponsesAnswer,
)
from inflight.frontends.openai.embeddings import EmbeddingsBody, answer, check_format, texts_of
from inflight.frontends.openai.errors import error_json, refusal
from inflight.frontends.openai.request import ChatBody, CompletionBody, answer_grammar, image_of, requests_of, tools_of
from inflight.frontends.openai.response import Reply, Usage
from inflight.frontends.openai.responses import ResponseReply, ResponsesBody, chat_body
from inflight.frontends.openai.tokens import DetokenizeBody, Detokenized
from inflight.frontends.openai.tools import Tools
from inflight.frontends.routes import Access, Call, Events, Plain, Route, generation
from inflight.frontends.served_models import (
    MODELS,
    Served,
    asks_for_anthropics,
    public_id,
    served_model,
    served_models,
)
from inflight.wire import DONE, EventStream, Opened, Refusal, Scope, Send, respond_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_QUEUE = 64
"""Events of several choices that are queued for a slow client; beyond it the readers of the generations pause."""


class OpenAiRest(NamedModelDoor):
    """Answers every path under `/v1/` with the language models served here."""

    name = "OpenAI"
    below = ("/v1/",)
    error = OpenAiError
    whole_floats = True

    def __init__(self, backend: Backend, *, tgi: bool = False, control: Control | None = None) -> None:
        """
        Args:
            tgi: answers have TGI's form where it differs from OpenAI's.
            control: loads and unloads adapters; None: nobody can.
        """
        super().__init__(backend)
        self._tgi = tgi
        self._control = control or Control(backend)

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error, self._tgi)

    async def _chat(self, call: Call) -> None:
        body: ChatBody = call.body()
        generator = pick(self._backend, body.model)
        if self._tgi and body.tools is not None and body.response_format is not None:
            raise ToolError("Grammar and tools are mutually exclusive")
        requests, prompt = await _prepared(generator, body)
        reply = Reply(
            "chat.completion",
            self._named(generator, body.model),
            logprobs=bool(body.logprobs),
            most=body.top_logprobs or 0,
            scored=body.prompt_logprobs,
            reader=partial(prompt.tools.reader, prompt.text),
            thoughts=body.include_reasoning is not False,
            counted=_counted(body),
            tgi=self._tgi,
        )
        await self._answer(call, body, generator, requests, reply)

    async def _completions(self, call: Call) -> None:
        body: CompletionBody = call.body()
        generator = pick(self._backend, body.model)
        prompts = _prompts(body.prompt, "prompt")
        limit = generator.info.limits.max_client_batch_size or (CLIENT_BATCH if self._tgi else None)
        if limit is not None and len(prompts) > limit:
            raise InvalidRequest(f"batch size {len(prompts)} is more than the maximum of {limit} prompts")
        grammar = answer_grammar(body)
        requests = requests_of(body, prompts, generator.info, special=True, grammar=grammar)
        echo = [await _shown(generator, prompt) for prompt in prompts] if body.echo else None
        reply = Reply(
            "text_completion",
            self._named(generator, body.model),
            logprobs=body.logprobs is not None,
            most=body.logprobs or 0,
            scored=body.prompt_logprobs,
            echo=echo,
            counted=_counted(body),
            tgi=self._tgi,
        )
        await self._answer(call, body, generator, requests, reply)

    async def _answer(
        self,
        call: Call,
        body: ChatBody | CompletionBody,
        generator: Generator,
        requests: Sequence[GenerationRequest],
        reply: Reply,
    ) -> None:
        choices = body.n or 1
        if body.stream:
            usage = Usage() if _counted(body) else None
            work = _stream(generator, requests, choices, reply, usage, call.send)
            await call.run(work)
            return
        results = await call.run(in_turns(generator, requests))
        counted = Usage()
        if isinstance(body, CompletionBody):
            if body.max_tokens == 0:
                results = [_only_prompt(one) for one in results]
            if body.best_of is not None and body.best_of > choices:
                for index, one in enumerate(results):
                    counted.add(index // body.best_of, one.start, one.finish)
                results = _best(results, body.best_of, choices)
                headers = warning_headers(results[0].start)
                await respond_json(call.send, reply.whole(results, counted, choices), headers=headers)
                return
        for index, one in enumerate(results):
            counted.add(index // choices, one.start, one.finish)
        headers = warning_headers(results[0].start)
        await respond_json(call.send, reply.whole(results, counted, choices), headers=headers)

    async def _responses(self, call: Call) -> None:
        body: ResponsesBody = call.body()
        generator = pick(self._backend, body.model)
        (request,), prompt = await _prepared(generator, chat_body(body))
        reader = prompt.tools.reader(prompt.text)
        reply = ResponseReply(body, self._named(generator, body.model), reader, timed=not self._tgi)
        if body.stream:
            await call.run(_stream_response(generator, request, reply, call.send))
        else:
            one = await call.run(whole(generator, request))
            await respond_json(call.send, reply.whole(one), headers=warning_headers(one.start))

    async def _embeddings(self, call: Call) -> None:
        body: EmbeddingsBody = call.body()
        generator = pick(self._backend, body.model)
        check_format(body, generator)
        prompts = _prompts(body.input, "input")
        if "" in prompts:
            raise InvalidRequest("`input` cannot be an empty text")
        adapter = body.model if body.model in generator.info.adapters else None
        results = await call.run(in_turns(generator, texts_of(body, prompts, adapter)))
        found = [embedding_of(one) for one in results]
        await respond_json(
            call.send, answer(body, self._named(generator, body.model), found, generator.info.unit_vectors)
        )

    async def _detokenize(self, call: Call) -> None:
        body: DetokenizeBody = call.body()
        generator = pick(self._backend, body.model)
        told: Detokenized = {"prompt": await generator.decode(body.tokens)}
        await respond_json(call.send, told)

    async def _models(self, call: Call) -> None:
        """Lists the loaded models and those that a request loads, or describes one. For a model that is not loaded yet,
        and for all requests while no model is, the answer is `Loading`."""
        name = call.names.get("name", "")
        if name:
            await respond_json(call.send, _model(served_model(self._backend, name, self._tgi)))
            return
        more = await self.directory.language_models() if self.directory is not None and not self._tgi else ()
        served = bool(self._backend.generators) or not more
        found = [_model(one) for one in served_models(self._backend, self._tgi)] if served else []
        listed = {one["id"] for one in found}
        found += [{**_PLAIN, "id": name} for name in more if name not in listed]
        await respond_json(call.send, {"object": "list", "data": found})

    async def _load_adapter(self, call: Call) -> None:
        body: LoadAdapterBody = call.body()
        await call.run(load_adapter(self._control, body))
        await respond_plain(call.send, f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def _unload_adapter(self, call: Call) -> None:
        body: UnloadAdapterBody = call.body()
        await unload_adapter(self._control, body)
        await respond_plain(call.send, f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def serves(self, scope: Scope) -> bool:
        """Not what Anthropic's clients ask for by the same paths."""
        return not asks_for_anthropics(scope)

    def _named(self, generator: Generator, asked: str | None) -> str:
        """The model's name in an answer: the one that was asked for, if the model has it."""
        info = generator.info
        if asked is not None and not self._tgi and asked in (info.name, info.model_id, *info.adapters):
            return asked
        return public_id(info.name, generator, self._tgi)

    routes: ClassVar[Sequence[Route]] = (
        generation(CHAT, "Chat", _chat, ChatBody, ChatAnswer, events=Events.ASKED),
        generation(COMPLETIONS, "Complete", _completions, CompletionBody, CompletionAnswer, events=Events.ASKED),
        generation(
            "/v1/responses", "Chat, in the newer form", _responses, ResponsesBody, ResponsesAnswer, events=Events.ASKED
        ),
        generation("/v1/embeddings", "Embed texts", _embeddings, EmbeddingsBody, EmbeddingsAnswer),
        Route(
            "POST",
            "/detokenize",
            "The text of tokens, as vLLM has it",
            _detokenize,
            DetokenizeBody,
            answer=Detokenized,
            access=Access.KEY,
            language=True,
        ),
        Route(
            "POST",
            "/v1/load_lora_adapter",
            "Load a LoRA adapter, as vLLM has it",
            _load_adapter,
            LoadAdapterBody,
            answer=Plain(),
            access=Access.ADMIN,
            language=True,
        ),
        Route(
            "POST",
            "/v1/unload_lora_adapter",
            "Unload a LoRA adapter, as vLLM has it",
            _unload_adapter,
            UnloadAdapterBody,
            answer=Plain(),
            access=Access.ADMIN,
            language=True,
        ),
        Route("GET", MODELS, "What is served", _models, answer=ModelsAnswer, language=True),
        Route("GET", f"{MODELS}/{{name*}}", "One model", _models, answer=ModelAnswer, language=True),
    )


_PLAIN = {"id": "", "object": "model", "created": 0, "owned_by": "inflight"}


def _model(one: Served) -> dict[str, Any]:
    told: dict[str, Any] = {**_PLAIN, "id": one.id, "max_model_len": one.generator.info.limits.max_total_tokens}
    return told if one.parent is None else {**told, "parent": one.parent}


def _counted(body: ChatBody | CompletionBody) -> bool:
    """Whether a stream ends with the number of its tokens."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


async def chat_requests(generator: Generator, given: dict[str, Any]) -> list[GenerationRequest]:
    """The requests of a chat's body that is already parsed from JSON.

    Raises:
        msgspec.ValidationError: the body has another form.
        InvalidRequest: as on the chat route.
    """
    return (await _prepared(generator, msgspec.convert(given, ChatBody)))[0]


class ChatPrompt(NamedTuple):
    """A chat as the model gets it.

    Attributes:
        text: the prompt, with the places of the images. It is encoded without adding special tokens.
    """

    tools: Tools
    text: str
    media: tuple[Media, ...]


async def chat_prompt(generator: Generator, body: ChatBody) -> ChatPrompt:
    """A chat's tools, its prompt and its images.

    Raises:
        InvalidRequest: as on the chat route.
    """
    messages, media = from_messages(body.messages, generator.info, image_of)
    tools = tools_of(msgspec.structs.replace(body, messages=messages), generator.info)
    return ChatPrompt(tools, await generator.render(tools.chat), media)


async def _prepared(generator: Generator, body: ChatBody) -> tuple[list[GenerationRequest], ChatPrompt]:
    """The requests of a chat, one for each choice, and its prompt."""
    prompt = await chat_prompt(generator, body)
    info, grammar = generator.info, prompt.tools.grammar
    # The template has already written the special tokens.
    requests = requests_of(body, [prompt.text], info, special=False, grammar=grammar, media=prompt.media)
    thought = prompt.tools.thought(prompt.text, body.thinking_token_budget)
    return [replace(one, thought=thought) for one in requests] if thought is not None else requests, prompt


def _prompts(prompt: str | list[Any], field: str) -> list[str | Sequence[int]]:
    """Texts, or lists of tokens; a list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest(f"`{field}` cannot be empty")
    if _is_tokens(prompt):
        return [prompt]
    for one in prompt:
        if not isinstance(one, str) and not (isinstance(one, list) and _is_tokens(one)):
            raise InvalidRequest(f"`{field}` must be a text, token ids, or a list of texts or of lists of token ids")
    return prompt


def _is_tokens(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


async def _shown(generator: Generator, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else await generator.decode(prompt)


def _only_prompt(one: Whole) -> Whole:
    """The answer for `max_tokens` 0: without the one token that was computed beside the prompt's probabilities."""
    return replace(one, tokens=(), finish=replace(one.finish, text="", generated=0, reason=FinishReason.LENGTH))


def _best(results: Sequence[Whole], best_of: int, choices: int) -> list[Whole]:
    """The `choices` most likely results of every `best_of`."""
    found: list[Whole] = []
    for first in range(0, len(results), best_of):
        ranked = sorted(results[first : first + best_of], key=lambda one: -one.mean_logprob)
        found += ranked[:choices]
    return found


async def _stream(
    generator: Generator,
    requests: Sequence[GenerationRequest],
    choices: int,
    reply: Reply,
    usage: Usage | None,
    send: Send,
) -> None:
    turns = _Turns(generator, requests)
    try:
        first = await turns.open()
        headers = [(b"x-accel-buffering", b"no"), *warning_headers(first)]
        async with EventStream(send, headers) as stream:
            starts: dict[int, Start] = {}
            try:
                async for index, event in turns.events():
                    if isinstance(event, Token):
                        chunks = reply.token(index, event)
                    elif isinstance(event, Start):
                        starts[index] = event
                        chunks = reply.start(index, choices, event)
                    else:
                        start = starts.get(index, Start(0))
                        chunks = reply.finish(index, event, start)
                        if usage is not None:
                            usage.add(index // choices, start, event)
                    for chunk in chunks:
                        await stream.event(chunk)
                if usage is not None:
                    await stream.event(reply.usage(usage))
            except InflightError as error:
                await stream.event(error_json(error))
            await stream.event(DONE)
    finally:
        await turns.close()


class _Turns:
    """The events of any number of generations, of which as many run at a time as the model takes."""

    def __init__(self, generator: Generator, requests: Sequence[GenerationRequest]) -> None:
        self._generator, self._requests = generator, requests
        self._size = turn_of(generator)
        self._opened: list[Opened[Event]] = []

    async def open(self, first: int = 0) -> Event | None:
        """Begins the turn with request number `first`; returns that request's first event."""
        requests = self._requests[first : first + self._size]
        self._opened = [Opened(self._generator.generate(request)) for request in requests]
        await asyncio.gather(*(one.open() for one in self._opened))
        return self._opened[0].first

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events, each with its request's index, after `open`."""
        async for index, event in _merged(self._opened):
            yield index, event
        for first in range(self._size, len(self._requests), self._size):
            await self.close()
            await self.open(first)
            async for index, event in _merged(self._opened):
                yield first + index, event

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self._opened))


async def _stream_response(generator: Generator, request: GenerationRequest, reply: ResponseReply, send: Send) -> None:
    opened = await Opened(generator.generate(request)).open()
    try:
        headers = [(b"x-accel-buffering", b"no"), *warning_headers(opened.first)]
        async with EventStream(send, headers) as stream:

            async def tell(events: Iterable[tuple[str, bytes]]) -> None:
                for kind, data in events:
                    await stream.event(data, f"event: {kind}\ndata: ".encode())

            await tell(reply.begin())
            try:
                async for event in opened:
                    await tell(reply.events(event))
            except InflightError as error:
                await tell([reply.failed(error)])
    finally:
        await opened.close()


async def _merged(opened: Sequence[Opened[Event]]) -> AsyncIterator[tuple[int, Event]]:
    """Events of several generations as they arrive, each with its generation's index."""
    if len(opened) == 1:
        async for event in opened[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | InflightError]] = asyncio.Queue(_QUEUE)

    async def read(index: int) -> None:
        try:
            async for event in opened[index]:
                await queue.put((index, event))
        except InflightError as error:
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(read(index)) for index in range(len(opened))]
    try:
        left = len(opened)
        while left:
            index, got = await queue.get()
            if isinstance(got, InflightError):
                raise got
            yield index, got
            left -= isinstance(got, Finish)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
