"""The routes of clouds that TGI serves: Google's `/vertex` and Amazon's `/invocations`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import orjson

from inflight.config import RestConfig
from inflight.contract import GenerationRequest
from inflight.errors import InflightError, InvalidRequest
from inflight.frontends.base import Backend
from inflight.frontends.door import FORWARDED, Door
from inflight.frontends.llm import all_of, pick
from inflight.frontends.openai import CHAT, COMPLETIONS, ChatBody, CompletionBody, OpenAiRest, chat_requests
from inflight.frontends.routes import Call, Events, Route, generation
from inflight.frontends.tgi import GenerateBody, Predictions, TgiError, TgiRest, check_body, refusal
from inflight.wire import PAYLOAD_OPTION, App, Body, Gate, Gates, Message, Receive, Refusal, respond_json

INVOCATIONS = "/invocations"


class InstancesOf(msgspec.Struct):
    """`POST /vertex`."""

    instances: list[dict[str, Any]]


class CloudRest(Door):
    """Answers both routes, and the paths that Google's platform names (`RestConfig`)."""

    name = "Text Generation Inference"
    error = TgiError
    size_option = PAYLOAD_OPTION

    def __init__(self, backend: Backend, tgi: TgiRest, openai: OpenAiRest, config: RestConfig = RestConfig()) -> None:
        vertex, _ = self.routes
        predict = [replace(vertex, path=path) for path in config.predict_routes]
        health = [Route("GET", path, "TGI's health", CloudRest._health) for path in config.health_routes]
        super().__init__(backend, [*predict, *health])
        self._tgi = tgi
        self._openai = openai
        self._gates, self._gates_of_two_forms = Gates(refusal), Gates(None)

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)

    def limit(self, call: Call) -> int:
        return self._payload_limit()

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        """The gate of a route. That of `/invocations` has no form of refusal, because this form depends on the body."""
        gates = self._gates_of_two_forms if route.path == INVOCATIONS else self._gates
        return gates.of(next(iter(self._backend.generators.values())))

    async def _health(self, call: Call) -> None:
        await self._tgi({**call.scope, "path": "/health", FORWARDED: True}, call.receive, call.send)

    async def _invocations(self, call: Call) -> None:
        """Forwards a body to TGI's or OpenAI's route, found by the field that only its bodies have."""
        body: Body = call.body()
        fields = _object(body).keys()
        again = _replayed(body, call.receive)
        del body  # so that it is freed when the route has read it
        kind = (b"content-type", b"application/json")
        headers = [*(pair for pair in call.scope["headers"] if pair[0] != kind[0]), kind]
        route: App
        if "inputs" in fields:
            route, path = self._tgi, "/"
        elif "messages" in fields:
            route, path = self._openai, CHAT
        elif "prompt" in fields:
            route, path = self._openai, COMPLETIONS
        else:
            raise InvalidRequest("the body has none of `inputs`, `messages` and `prompt`")
        del fields
        await route({**call.scope, "headers": headers, "path": path, FORWARDED: True}, again, call.send)

    async def _vertex(self, call: Call) -> None:
        instances = _object(call.body()).get("instances")
        if not isinstance(instances, list) or not instances:
            raise InvalidRequest("`instances` must be a list of at least one instance")
        generator = pick(self._backend)
        limit = generator.info.policy.max_concurrent_requests
        if len(instances) > limit:
            raise InvalidRequest(f"{len(instances)} instances are more than the {limit} that are answered at a time")
        requests: list[GenerationRequest] = []
        for index, instance in enumerate(instances):
            try:
                if isinstance(instance, dict) and "messages" in instance:
                    requests += await chat_requests(generator, instance)
                else:
                    requests.append(check_body(instance, generator.info))
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"instances[{index}]: {error}") from error
        del instances  # a generation takes long
        results = await call.run(all_of(generator, requests))
        answer: Predictions = {"predictions": [one.finish.text for one in results]}
        await respond_json(call.send, answer)

    routes: ClassVar[Sequence[Route]] = (
        generation("/vertex", "Google's form", _vertex, bytes, Predictions, shown=InstancesOf),
        generation(
            INVOCATIONS,
            "Amazon's form: the body of `/`, of a chat or of a completion",
            _invocations,
            bytes,
            shown=GenerateBody | ChatBody | CompletionBody,
            events=Events.ASKED,
            error=dict[str, Any],
        ),
    )


def _object(body: Body) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the request must be a JSON object")
    return document


def _replayed(body: Body, receive: Receive) -> Receive:
    """A `receive` that returns the body once more, then what the original returns."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
