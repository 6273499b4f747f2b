"""The generate extension of the Open Inference Protocol: `/v2/models/<model>/generate` and `/generate_stream`.

A language model takes `text_input` and `parameters`; any other method takes its inputs as fields of their names, one
instance a request, and streams the text of the language models within it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import orjson

from inflight.contract import GeneratorInfo, MethodInfo, Row, TextPart, Value
from inflight.errors import InflightError, InvalidRequest, NotFound
from inflight.frontends.base import Backend, generator_of, predict, stream
from inflight.frontends.events import Part, send_events
from inflight.frontends.images import split_images, value_of_image
from inflight.frontends.json_outputs import json_outputs
from inflight.frontends.json_values import value_of
from inflight.wire import Receive, Send, respond, run_until_disconnect

_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
"""Names of parameters in other servers, with our names for them."""
_IGNORED = ("stream", "details", "logprob", "logprobs", "return_full_text", "exclude_input_in_output")
_INPUTS = ("text_input", "inputs", "prompt")


def read_generate(
    backend: Backend, method: MethodInfo, body: bytes | bytearray | memoryview
) -> tuple[Row, dict[str, Any]]:
    """The one instance of a body, and the fields that every answer repeats.

    Raises:
        InvalidRequest: the body is not a JSON object, or an input is missing.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest('the request must be a JSON object like {"text_input": "...", "parameters": {}}')
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest("'parameters' must be an object")
    common = {"model_name": method.servable, "model_version": str(method.version)}
    if isinstance(document.get("id"), str):
        common["id"] = document["id"]
    if _writes(method):
        return _generation(document, parameters, _info(backend, method)), common
    named: dict[str, Value] = {}
    declared = method.dtypes
    for spec in method.inputs:
        if spec.name in document:
            named[spec.name] = value_of(document[spec.name], declared.get(spec.name))
        elif spec.name in parameters:
            named[spec.name] = value_of(parameters[spec.name], declared.get(spec.name))
    needed = [spec.name for spec in method.inputs if spec.name not in dict(method.optional)]
    if "text_input" in document and len(needed) == 1:
        named.setdefault(needed[0], value_of(document["text_input"], declared.get(needed[0])))
    return method.row(named), common


def _info(backend: Backend, method: MethodInfo) -> GeneratorInfo:
    generator = generator_of(backend.generators, method)
    if generator is None:
        raise NotFound(f"the model '{method.servable}' was unloaded")
    return generator.info


def _generation(document: dict[str, Any], parameters: dict[str, Any], info: GeneratorInfo) -> Row:
    document, media = split_images(document, "the request", info)
    text = next((document[name] for name in _INPUTS if name in document), "" if media else None)
    if not isinstance(text, str):
        raise InvalidRequest("'text_input' must be a text")
    given = {_NAMES.get(name, name): value for name, value in parameters.items() if name not in _IGNORED}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    details = [each.detail for each in media if each.detail != "auto"]
    if details:
        given.setdefault("detail", details[0])
    return [text, *map(value_of_image, media), orjson.dumps(given).decode()]


async def answer_generate(
    backend: Backend, method: MethodInfo, row: Row, common: dict[str, Any], receive: Receive, send: Send
) -> None:
    """Sends one whole answer."""
    (outcome,) = await run_until_disconnect(predict(backend, method, [row]), receive)
    if isinstance(outcome, InflightError):
        raise outcome
    await respond(send, _outputs(method, outcome, common, streamed=False))


async def stream_generate(
    backend: Backend, method: MethodInfo, row: Row, common: dict[str, Any], receive: Receive, send: Send
) -> None:
    """Sends an event for every piece of text, and one with the outputs."""

    async def parts() -> AsyncGenerator[Part, None]:
        async with aclosing(stream(backend, method, [row])) as written:
            async for part in written:
                if not isinstance(part, TextPart) and isinstance(part[0], InflightError):
                    raise part[0]
                yield part

    def frames(part: Part) -> Iterable[bytes]:
        if isinstance(part, TextPart):
            yield orjson.dumps({**common, "text_output": part.text})
        else:
            (outcome,) = part
            assert not isinstance(outcome, InflightError)
            yield _outputs(method, outcome, common, streamed=True)

    def failed(error: InflightError) -> bytes:
        return orjson.dumps({**common, "error": str(error)})

    work = send_events(parts(), send, frames, failed)
    await run_until_disconnect(work, receive)


def _writes(method: MethodInfo) -> bool:
    """Whether it is the method `generate` of a language model."""
    return bool(method.optional) and method.outputs[0].name == "generated_text"


def _outputs(method: MethodInfo, outcome: Row, common: dict[str, Any], streamed: bool) -> bytes:
    if not _writes(method):
        return json_outputs(method, outcome, common)
    text, reason, count = outcome
    details = {"finish_reason": reason, "generated_tokens": int(count)}  # type: ignore[arg-type]  # it is a number
    return orjson.dumps({**common, "text_output": "" if streamed else text, "details": details})
