"""MindSpore Serving's REST interface as a raw ASGI application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import orjson

from inflight.config import RestConfig
from inflight.errors import InflightError, InvalidRequest, Loading, NotFound
from inflight.frontends.base import Backend, callbacks
from inflight.frontends.events import Part, send_events
from inflight.frontends.mindspore.request import parse_columns, parse_instances, parse_json
from inflight.frontends.mindspore.response import Reply, encode_error, encode_reply
from inflight.frontends.mindspore.url import Target, parse_encoded, parse_url
from inflight.frontends.routes import error_headers
from inflight.log import LOGGER
from inflight.table import Table
from inflight.types import MethodInfo, Outcome, Row, TextPart
from inflight.wire import (
    JSON,
    Answer,
    Body,
    Disconnected,
    Header,
    Receive,
    Scope,
    Send,
    header,
    nothing_to_cancel,
    read_body,
    respond,
    run_until_disconnect,
)

_CLOSE = (b"connection", b"close")


class MindSporeRest:
    """Answers `POST /model/<servable>[/version/<n>]:<method>`, and everything else with an error.

    Each request gets exactly one JSON answer, unless its client leaves first. The HTTP status is 200 for errors too,
    since existing scripts read `error_msg` whatever it is; `config.status_codes` gives each error its own. A servable
    that was announced and is not loaded yet is 503 in any case: who waits for a server looks at the status.
    """

    def __init__(self, backend: Backend, *, max_body_bytes: int, config: RestConfig) -> None:
        self._backend = backend
        self._max_body_bytes = max_body_bytes
        self._status_codes = config.status_codes
        self._callbacks = callbacks(backend)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        headers = []
        unread = True
        try:
            if scope["method"] != "POST":
                raise InvalidRequest("http message only support POST right now")
            body = await read_body(scope, receive, self._max_body_bytes)
            unread = False
            method, rows = self._read(scope, body)
            del body  # what answers it may take long, and views what it needs of it
            if wants_events(scope):
                await self._stream(method, rows, receive, send)
                return
            outcomes = await run_until_disconnect(self._backend.predict(method, rows), receive)
            reply = encode_reply(method, outcomes)
        except Disconnected:
            return
        except InflightError as error:
            reply = encode_error(error)
            if unread and header(scope, b"expect"):
                headers.append(_CLOSE)  # whether the body still comes is the client's choice, so nothing can follow it
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            reply = _internal(error)
        await respond(send, reply.body, status=self._status(reply), headers=[*headers, *_headers(reply)])

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`: the same steps, with the backend's callback in place of waiting for it."""
        if (
            self._callbacks is None
            or scope["method"] != "POST"
            or len(body) > self._max_body_bytes
            or wants_events(scope)
        ):
            return None
        try:
            method, rows = self._read(scope, body)
            return self._callbacks.submit(method, rows, partial(self._finish, method, answer))
        except InflightError as error:
            reply = encode_error(error)
        except Exception as error:  # as in __call__
            reply = _internal(error)
        answer(self._status(reply), [JSON, *_headers(reply)], reply.body)
        return nothing_to_cancel

    def _finish(self, method: MethodInfo, answer: Answer, result: list[Outcome] | InflightError) -> None:
        try:
            reply = encode_error(result) if isinstance(result, InflightError) else encode_reply(method, result)
        except Exception as error:  # as in __call__
            reply = _internal(error)
        answer(self._status(reply), [JSON], reply.body)

    def _status(self, reply: Reply) -> int:
        error = reply.error
        return error.http_status if error is not None and (self._status_codes or isinstance(error, Loading)) else 200

    def _read(self, scope: Scope, body: Body) -> tuple[MethodInfo, Sequence[Row]]:
        # The order of these steps decides which of several errors is told: body, URL, content, then the names in it.
        document = parse_json(body)
        target = self._target(scope)
        try:
            method = self._backend.method(*target)
        except InflightError:
            parse_instances(document)  # what is wrong in there is told first
            raise
        columns = parse_columns(document, method.dtypes)
        if columns is not None and method.inputs:
            return method, Table(method.pick(columns)).rows()
        return method, [method.row(named) for named in parse_instances(document, method.dtypes)]

    def _target(self, scope: Scope) -> Target:
        """What the URL names: literally, as MindSpore Serving reads it, else percent-decoded once."""
        url = _url(scope)
        if b"%" in url:
            for read in (parse_url, parse_encoded):
                try:
                    self._backend.method(*read(url))
                    return read(url)
                except (InvalidRequest, NotFound):
                    continue
        return parse_url(url)

    async def _stream(self, method: MethodInfo, rows: Sequence[Row], receive: Receive, send: Send) -> None:
        """Where a client accepts events: one for every piece of text that a language model writes, last the answer."""

        def frames(part: Part) -> Iterable[bytes]:
            if isinstance(part, TextPart):
                yield orjson.dumps({"instances": [{"index": part.index, "text": part.text}]})
            else:
                yield encode_reply(method, part).body

        work = send_events(self._backend.stream(method, rows), send, frames, lambda error: encode_error(error).body)
        await run_until_disconnect(work, receive)


def wants_events(scope: Scope) -> bool:
    """Whether a client asked for a stream of events and nothing else."""
    for name, value in scope["headers"]:
        if name == b"accept":
            return bool(value.startswith(b"text/event-stream"))
    return False


def _headers(reply: Reply) -> list[Header]:
    return [] if reply.error is None else error_headers(reply.error)


def _internal(error: Exception) -> Reply:
    LOGGER.error("REST request failed", exc_info=error)
    return encode_error(InflightError(f"Serving Error: internal error, {type(error).__name__}: {error}"))


def _url(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return path + b"?" + query if query else path
