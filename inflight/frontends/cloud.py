"""The routes of clouds that TGI serves: Google's `/vertex` and Amazon's `/invocations`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

from inflight.errors import InflightError, InvalidRequest
from inflight.frontends.base import Backend
from inflight.frontends.generate import all_of, payload_limit, pick
from inflight.frontends.openai import OpenAiRest, chat_requests
from inflight.frontends.routes import verb_of
from inflight.frontends.tgi import TgiRest, check_body, fail, refusal
from inflight.generation import GenerationRequest
from inflight.log import LOGGER
from inflight.wire import (
    App,
    Body,
    Disconnected,
    Gate,
    Gates,
    Message,
    Receive,
    Scope,
    Send,
    read_body,
    respond_json,
    run_until_disconnect,
)

VERTEX, INVOCATIONS = "/vertex", "/invocations"


class CloudRest:
    """Answers both, and the paths that Google's platform names in AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE.

    Attributes:
        paths: the verbs of each.
    """

    def __init__(self, backend: Backend, tgi: TgiRest, openai: OpenAiRest) -> None:
        self._backend = backend
        self._tgi = tgi
        self._openai = openai
        self.paths: Mapping[str, Sequence[str]] = {
            **dict.fromkeys((VERTEX, INVOCATIONS, *_named("AIP_PREDICT_ROUTE")), ("POST",)),
            **dict.fromkeys(_named("AIP_HEALTH_ROUTE"), ("GET",)),
        }
        self._gates, self._gates_of_two_forms = Gates(refusal), Gates(None)

    def gate(self, scope: Scope) -> Gate | None:
        """Where its generations have to pass. `/invocations` answers in the form that the body has."""
        if scope["method"] != "POST":
            return None
        gates = self._gates_of_two_forms if scope["path"] == INVOCATIONS else self._gates
        return gates.of(next(iter(self._backend.generators.values())))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for one of these routes."""
        try:
            if verb_of(scope) == "GET":
                await self._tgi({**scope, "path": "/health"}, receive, send)
                return
            limit = payload_limit(self._backend)
            if scope["path"] == INVOCATIONS:
                await self._dispatch(scope, limit, receive, send)
            else:
                await self._predictions(_object(await read_body(scope, receive, limit)), receive, send)
        except Disconnected:
            return
        except InflightError as error:
            await fail(send, error)
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            LOGGER.error("%s failed", scope["path"], exc_info=error)
            await fail(send, InflightError("internal server error, the server's log has the details"))

    async def _dispatch(self, scope: Scope, limit: int, receive: Receive, send: Send) -> None:
        """The route that a body belongs to, by the field that each of them needs."""
        body = await read_body(scope, receive, limit)
        fields = _object(body).keys()
        again = _replayed(body, receive)
        del body  # it goes when the route has read it
        headers = [*scope["headers"], (b"content-type", b"application/json")]
        scope = {**scope, "headers": [pair for pair in headers if pair[0] != b"content-type"] + headers[-1:]}
        route: App
        if "inputs" in fields:
            route, path = self._tgi, "/"
        elif "messages" in fields:
            route, path = self._openai, "/v1/chat/completions"
        elif "prompt" in fields:
            route, path = self._openai, "/v1/completions"
        else:
            raise InvalidRequest("the body has none of `inputs`, `messages` and `prompt`")
        del fields
        await route({**scope, "path": path}, again, send)

    async def _predictions(self, document: dict[str, Any], receive: Receive, send: Send) -> None:
        instances = document.get("instances")
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
                    requests.append(check_body(instance, generator.info.limits))
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"instances[{index}]: {error}") from error
        del document, instances  # a generation takes long
        results = await run_until_disconnect(all_of(generator, requests), receive)
        await respond_json(send, {"predictions": [one.finish.text for one in results]})


def _named(variable: str) -> list[str]:
    path = os.environ.get(variable)
    return [path] if path else []


def _object(body: Body) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the request must be a JSON object")
    return document


def _replayed(body: Body, receive: Receive) -> Receive:
    """A `receive` that has the body once more, and then no longer."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again
