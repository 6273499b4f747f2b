"""MindSpore Serving's REST interface: `POST /model/<servable>[/version/<n>]:<method>`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec
import orjson

from inflight.config import RestConfig
from inflight.contract import MethodInfo, Outcome, Row, Table, TextPart
from inflight.errors import InflightError, InvalidRequest, Loading, NotFound
from inflight.frontends.base import Backend, stream
from inflight.frontends.door import Done, QuickDoor, Reply, respond_parts
from inflight.frontends.events import Part, send_events
from inflight.frontends.mindspore.request import parse_columns, parse_instances, parse_json
from inflight.frontends.mindspore.response import encode_error, encode_reply
from inflight.frontends.mindspore.url import Target, parse_encoded, parse_url
from inflight.frontends.routes import Access, Call, Events, Match, Route
from inflight.wire import JSON, Body, Refusal, Scope

_NO_NAMES: Mapping[str, str] = {}  # the URL is read after the body, because the order decides which error is reported


class InstancesBody(msgspec.Struct):
    """A request."""

    instances: list[Any] | dict[str, Any] | str


class MindSporeRest(QuickDoor):
    """Answers its one route, and every other request below `/model/` with an error.

    The HTTP status is 200 for errors too, since existing scripts read `error_msg` whatever the status;
    `config.status_codes` gives each error its own. A servable that was announced and is not loaded yet is 503 in any
    case, because clients that wait for a server check the status.
    """

    name = "MindSpore Serving"
    always_200 = True
    below = ("/model/", "/version/")  # MindSpore Serving also accepts this order: /version/1/model/<servable>

    def __init__(self, backend: Backend, *, max_body_bytes: int, config: RestConfig) -> None:
        super().__init__(backend)
        self._submit = backend.submit
        self._max_body_bytes = max_body_bytes
        self._status_codes = config.status_codes

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error, self._status_codes or isinstance(error, Loading))

    def internal(self, error: Exception) -> str:
        return f"Serving Error: internal error, {type(error).__name__}: {error}"

    def limit(self, call: Call) -> int:
        return self._max_body_bytes

    def find(self, scope: Scope) -> Match:
        """The one route. As in MindSpore Serving, the verb is checked before the URL."""
        if scope["method"] != "POST":
            raise InvalidRequest("http message only support POST right now")
        return self.routes[0], _NO_NAMES

    async def _run(self, call: Call) -> None:
        if wants_events(call.scope):
            method, rows = self._read(call.scope, call.body())
            await call.run(self._stream(method, rows, call))
        else:
            await respond_parts(call.send, *await self.answered(call))

    def quick(self, scope: Scope, size: int) -> Match | None:
        quick = scope["method"] == "POST" and size <= self._max_body_bytes and not wants_events(scope)
        return (self.routes[0], _NO_NAMES) if quick else None

    def begin(self, scope: Scope, names: Mapping[str, str], body: Body, done: Done) -> Callable[[], None]:
        method, rows = self._read(scope, body)
        return self._submit(method, rows, partial(self.finish, done, scope, _reply, method))

    def _read(self, scope: Scope, body: Body) -> tuple[MethodInfo, Sequence[Row]]:
        # The order of these steps decides which of several errors is reported: body, URL, content, then names.
        document = parse_json(body)
        target = self._target(scope)
        try:
            method = self._backend.method(*target)
        except InflightError:
            parse_instances(document)  # an error in the document is reported first
            raise
        columns = parse_columns(document, method.dtypes)
        if columns is not None and method.inputs:
            return method, Table(method.pick(columns))
        return method, [method.row(named) for named in parse_instances(document, method.dtypes)]

    def _target(self, scope: Scope) -> Target:
        """The method that the URL names: read literally, as in MindSpore Serving, else percent-decoded once."""
        url: bytes = scope.get("raw_path") or scope["path"].encode()
        if query := scope.get("query_string"):
            url = url + b"?" + query
        if b"%" in url:
            for read in (parse_url, parse_encoded):
                try:
                    self._backend.method(*read(url))
                    return read(url)
                except (InvalidRequest, NotFound):
                    continue
        return parse_url(url)

    async def _stream(self, method: MethodInfo, rows: Sequence[Row], call: Call) -> None:
        """Answers with events: one for every piece of text that a language model generates, last the whole answer."""

        def frames(part: Part) -> Iterable[bytes]:
            if isinstance(part, TextPart):
                yield orjson.dumps({"instances": [{"index": part.index, "text": part.text}]})
            else:
                yield encode_reply(method, part).body

        parts = stream(self._backend, method, rows)
        await send_events(parts, call.send, frames, lambda error: encode_error(error).body)

    routes: ClassVar[Sequence[Route]] = (
        Route(
            "POST",
            "/model/{name}[/version/{version}]:{method}",
            "Run a method",
            _run,
            bytes,
            shown=InstancesBody,
            answer=dict[str, Any],
            events=Events.ASKED,
            access=Access.KEY,
        ),
    )


def wants_events(scope: Scope) -> bool:
    """Whether a client asked for a stream of events and nothing else."""
    for name, value in scope["headers"]:
        if name == b"accept":
            return bool(value.startswith(b"text/event-stream"))
    return False


def _reply(method: MethodInfo, result: Sequence[Outcome] | InflightError) -> Reply:
    if isinstance(result, InflightError):
        raise result
    reply = encode_reply(method, result)
    if reply.error is not None:
        raise reply.error
    return 200, [JSON], (reply.body,)


def refusal(error: InflightError, status: bool) -> Refusal:
    """An error as one response. Args: status: send the error's own status instead of 200."""
    return Refusal(error.http_status if status else 200, [JSON, *error.headers], encode_error(error).body)
