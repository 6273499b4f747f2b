"""MindSpore Serving's REST interface as a raw ASGI application."""

from __future__ import annotations

from inflight.config import RestConfig
from inflight.errors import InflightError, InvalidRequest
from inflight.frontends.asgi import Receive, Scope, Send, header, respond
from inflight.frontends.base import Backend
from inflight.frontends.body import Body, read_body
from inflight.frontends.disconnect import Disconnected, run_until_disconnect
from inflight.frontends.rest.request import parse_instances, parse_json
from inflight.frontends.rest.response import Reply, encode_error, encode_reply
from inflight.frontends.rest.url import parse_url
from inflight.log import LOGGER

_CLOSE = (b"connection", b"close")


class MindSporeRest:
    """Answers `POST /model/<servable>[/version/<n>]:<method>`, and everything else with an error.

    Each request gets exactly one JSON answer, unless its client leaves first. The HTTP status is 200 for errors too,
    since existing scripts read `error_msg` whatever it is; `config.status_codes` gives each error its own.
    """

    def __init__(self, backend: Backend, *, max_body_bytes: int, config: RestConfig) -> None:
        self._backend = backend
        self._max_body_bytes = max_body_bytes
        self._status_codes = config.status_codes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        headers = []
        unread = True
        try:
            if scope["method"] != "POST":
                raise InvalidRequest("http message only support POST right now")
            body = await read_body(scope, receive, self._max_body_bytes)
            unread = False
            reply = await self._answer(scope, body, receive)
        except Disconnected:
            return
        except InflightError as error:
            reply = encode_error(error)
            if unread and header(scope, b"expect"):
                headers.append(_CLOSE)  # whether the body still comes is the client's choice, so nothing can follow it
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            LOGGER.exception("REST request failed")
            reply = encode_error(InflightError(f"Serving Error: internal error, {type(error).__name__}: {error}"))
        status = reply.error.http_status if self._status_codes and reply.error is not None else 200
        await respond(send, reply.body, status=status, headers=headers)

    async def _answer(self, scope: Scope, body: Body, receive: Receive) -> Reply:
        # The order of these steps decides which of several errors is told: body, URL, content, then the names in it.
        document = parse_json(body)
        target = parse_url(_url(scope))
        instances = parse_instances(document)
        method = self._backend.method(*target)
        rows = [method.row(named) for named in instances]
        outcomes = await run_until_disconnect(self._backend.predict(method, rows), receive)
        return encode_reply(method, outcomes)


def _url(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return path + b"?" + query if query else path
