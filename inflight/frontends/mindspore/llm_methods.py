"""Language models behind MindSpore Serving's URLs: `POST /model/<name>:generate` and `:generated_stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import msgspec
import orjson

from inflight.config import RestConfig
from inflight.contract import (
    NEWEST,
    Finish,
    GenerationRequest,
    Generator,
    GeneratorInfo,
    Media,
    Token,
    Whole,
    with_images,
)
from inflight.errors import InflightError, InvalidRequest, Unavailable
from inflight.frontends.base import Backend
from inflight.frontends.door import Door
from inflight.frontends.images import split_images
from inflight.frontends.llm import all_of, loaded
from inflight.frontends.mindspore.request import parse_json
from inflight.frontends.mindspore.rest import InstancesBody, MindSporeRest, refusal
from inflight.frontends.mindspore.url import parse_encoded, parse_url
from inflight.frontends.openai import ChatBody, chat_prompt
from inflight.frontends.routes import Call, Events, Match, Route, generation
from inflight.frontends.tgi.request import GenerateBody, Parameters, check
from inflight.wire import (
    MESSAGE_OPTION,
    PAYLOAD_OPTION,
    EventStream,
    Gate,
    Gates,
    Opened,
    Refusal,
    Scope,
    Send,
    respond_json,
    too_large,
)

GENERATE, STREAM = "generate", "generated_stream"
_TEXTS = ("inputs", "prompt", "text")
MESSAGES = "messages"
"""The key of a conversation in OpenAI's form, in the place of a text."""


class LlmMethods(Door):
    """Serves every language model by its name: `{"instances": [{"inputs": "...", "parameters": {...}}, ...]}`.

    A single instance needs no list, and a bare text is an instance too; the content type does not matter. Errors have
    MindSpore Serving's form and the status 200, unless `config.status_codes`; a model that cannot answer is 503.

    Args:
        max_body_bytes: limit of a body that is read at all. A smaller body over the model's own limit is refused after
            it is read, with an error about its size or its images.
    """

    name = "MindSpore Serving"
    always_200 = True
    below = MindSporeRest.below

    def __init__(self, backend: Backend, *, max_body_bytes: int, config: RestConfig) -> None:
        super().__init__(backend)
        self._max_body_bytes = max_body_bytes
        self._status_codes = config.status_codes
        self._gates = Gates(self.refusal, self._readable, MESSAGE_OPTION)

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error, self._status_codes or isinstance(error, Unavailable))

    def serves(self, scope: Scope) -> bool:
        """Whether a request names a language model's method."""
        return bool(self._backend.generators) and scope["method"] == "POST" and self._target(scope) is not None

    def find(self, scope: Scope) -> Match:
        """The route of a request; the names in the match are those of the model and the method."""
        target = self._target(scope)
        assert target is not None, "`serves` comes first"
        name, method = target
        return self.routes[method == STREAM], {"name": name}

    def limit(self, call: Call) -> int:
        return self._readable(loaded(self._backend.generators[call.names["name"]]))

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        return self._gates.of(self._backend.generators[names["name"]])

    def _readable(self, model: Generator) -> int:
        return max(model.info.limits.payload_limit, self._max_body_bytes)

    async def _generate(self, call: Call) -> None:
        generator, requests = await self._requests(call, streaming=False)
        results = await call.run(all_of(generator, requests))
        await respond_json(call.send, {"instances": [_instance(one) for one in results]})

    async def _stream(self, call: Call) -> None:
        generator, requests = await self._requests(call, streaming=True)
        await call.run(_stream(generator, requests, call.send))

    async def _requests(self, call: Call, *, streaming: bool) -> tuple[Generator, list[GenerationRequest]]:
        generator = self._backend.generators[call.names["name"]]
        body = call.body()
        limit, size, sees = generator.info.limits.payload_limit, len(body), generator.info.image_placeholder is not None
        instances = _instances(parse_json(body))
        del body  # the instances may take as much again
        if sees and size > limit:  # before images are decoded
            raise too_large(limit, PAYLOAD_OPTION)
        split = [_split(each, f"instance {index}", generator.info) for index, each in enumerate(instances)]
        if size > limit:  # of a model that reads text only an image says more than the size does
            raise too_large(limit, PAYLOAD_OPTION)
        return generator, await _requests(split, generator, streaming)

    def _target(self, scope: Scope) -> tuple[str, str] | None:
        url: bytes = scope.get("raw_path") or scope["path"].encode()
        for read in (parse_url, parse_encoded) if b"%" in url else (parse_url,):
            try:
                name, version, method = read(url)
            except InvalidRequest:
                continue
            if method in (GENERATE, STREAM) and (own := self._served(name, version)) is not None:
                return own, method
        return None

    def _served(self, name: str, version: int) -> str | None:
        """The name under which a version of a language model is served; None: it is not."""
        generators = self._backend.generators
        if name not in generators:
            return None
        if version == NEWEST:
            return name
        try:
            known = self._backend.method(name, version, GENERATE)
        except InflightError:
            return None
        own = f"{name}:{version}"
        return (own if own in generators else name) if known.optional else None

    routes: ClassVar[Sequence[Route]] = (
        generation(f"/model/{{name}}:{GENERATE}", "Generate", _generate, bytes, dict[str, Any], shown=InstancesBody),
        generation(
            f"/model/{{name}}:{STREAM}",
            "Generate, token by token",
            _stream,
            bytes,
            shown=InstancesBody,
            events=Events.ALWAYS,
        ),
    )


class _Split(NamedTuple):
    """An instance of a request: its fields without the images, or its text; and the images."""

    rest: Any
    media: list[Media]


def _instances(document: Any) -> list[Any]:
    try:
        found = msgspec.convert(document, InstancesBody).instances
    except msgspec.ValidationError:
        raise InvalidRequest('the request has no instances; write {"instances": [{"inputs": "<text>"}]}') from None
    return found if isinstance(found, list) else [found]


def _split(instance: Any, where: str, info: GeneratorInfo) -> _Split:
    if not isinstance(instance, dict):
        return _Split(instance, [])
    return _Split(*split_images(instance, where, info))


async def _requests(instances: list[_Split], generator: Generator, streaming: bool) -> list[GenerationRequest]:
    if not instances:
        raise InvalidRequest("the request has no instances; send at least one")
    most = generator.info.policy.max_concurrent_requests
    if len(instances) > most:
        raise InvalidRequest(
            f"the request has {len(instances)} instances and the model answers {most} at a time; send fewer in a "
            "request"
        )
    return [await _request(one, index, generator, streaming) for index, one in enumerate(instances)]


async def _request(one: _Split, index: int, generator: Generator, streaming: bool) -> GenerationRequest:
    info = generator.info
    body = _generate_body(one, index)
    if isinstance(one.rest, dict) and MESSAGES in one.rest:
        if one.media or body.inputs:
            raise InvalidRequest(f"instance {index} has '{MESSAGES}' and a text or images beside; write these in them")
        chat = await chat_prompt(generator, _chat_body(one.rest, index))
        request = check(GenerateBody(MESSAGES, body.parameters), info, streaming).request
        return replace(request, prompt=chat.text, media=chat.media, add_special_tokens=False)
    if not one.media:
        return check(body, info, streaming).request
    # A text beside images may be left out, which TGI's check does not know.
    checked = check(GenerateBody(body.inputs or info.vision.default_image_prompt, body.parameters), info, streaming)
    if checked.request.media:
        raise InvalidRequest(f"instance {index} has images by keys and as ![](...) in its text; not both are possible")
    return await with_images(generator, checked.request, one.media)


def _chat_body(instance: dict[str, Any], index: int) -> ChatBody:
    try:
        return msgspec.convert({MESSAGES: instance[MESSAGES]}, ChatBody)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"instance {index}: {error}") from error


def _generate_body(one: _Split, index: int) -> GenerateBody:
    """One instance as TGI's body. Its parameters are in `parameters`, or beside the text."""
    instance = one.rest
    if isinstance(instance, str):
        return GenerateBody(instance, Parameters())
    if not isinstance(instance, dict):
        raise InvalidRequest(f"instance {index} must be a text or an object with the key 'inputs'")
    key = next((name for name in _TEXTS if name in instance), None)
    text = "" if key is None and (one.media or MESSAGES in instance) else instance.get(key)
    if not isinstance(text, str):
        raise InvalidRequest(f"instance {index} has no text; give it by the key 'inputs', 'prompt' or 'text'")
    beside = {name: value for name, value in instance.items() if name not in (key, "parameters", MESSAGES)}
    given = instance.get("parameters") or {}
    if not isinstance(given, dict):
        raise InvalidRequest(f"instance {index}: 'parameters' must be an object")
    try:
        return GenerateBody(text, msgspec.convert({**beside, **given}, Parameters))
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"instance {index}: {error}") from error


def _instance(one: Whole) -> dict[str, Any]:
    return {
        "generated_text": one.finish.text,
        "finish_reason": one.finish.reason.value,
        "generated_tokens": one.finish.generated,
    }


async def _stream(generator: Generator, requests: list[GenerationRequest], send: Send) -> None:
    """Sends a frame for every token: `{"instances": [{"index", "text"}]}`; an instance's last frame also has its whole
    text."""
    opened = [Opened(generator.generate(request)) for request in requests]
    try:
        await asyncio.gather(*(one.open() for one in opened))
        async with EventStream(send, [(b"x-accel-buffering", b"no")]) as stream:

            async def tell(index: int, events: AsyncIterator[Any]) -> None:
                try:
                    async for event in events:
                        if isinstance(event, Token):
                            frame: dict[str, Any] = {"index": index, "text": event.delta}
                        elif isinstance(event, Finish):
                            whole = {
                                "generated_text": event.text,
                                "finish_reason": event.reason.value,
                                "generated_tokens": event.generated,
                            }
                            frame = {"index": index, "text": event.delta, **whole}
                        else:
                            continue
                        await stream.event(orjson.dumps({"instances": [frame]}))
                except InflightError as error:
                    frame = {"index": index, "error_code": error.mindspore_code, "error_msg": str(error)}
                    await stream.event(orjson.dumps({"instances": [frame]}))

            await asyncio.gather(*(tell(index, aiter(one)) for index, one in enumerate(opened)))
    finally:
        await asyncio.gather(*(one.close() for one in opened))
