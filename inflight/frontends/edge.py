"""Access checks before every HTTP route: the API key, and the web pages that may call (CORS)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from inflight.admission import Admission
from inflight.errors import InflightError, Unauthorized
from inflight.frontends.door import refuse
from inflight.wire import (
    Answer,
    Gate,
    GatedApp,
    Header,
    InlineApp,
    Message,
    Receive,
    Refusal,
    Scope,
    Send,
    authorized,
    header,
    respond,
)

NO_KEY = "this server needs its API key: send the header Authorization: Bearer <key>"
_EXPOSED = b"x-compute-type, x-compute-time, x-total-time, x-inference-time, x-generated-tokens, x-prompt-tokens"
_DAY = b"86400"


class EdgeApp(InlineApp, GatedApp, Protocol):
    """The application behind an `Edge`."""

    def open(self, scope: Scope) -> bool:
        """Whether a request needs no API key."""

    def refusal(self, scope: Scope, error: InflightError) -> Refusal:
        """An error in the form of the request's protocol."""


class Edge:
    """An application behind a key and a list of origins.

    Args:
        api_key: the key that routes require unless they are open; None: all are open.
        origins: web pages of these origins may call; `*` is any; empty: none.
    """

    def __init__(self, app: EdgeApp, api_key: str | None, origins: Sequence[str]) -> None:
        self._app = app
        self._api_key = api_key
        self._any = "*" in origins
        self._origins = [origin.rstrip("/").encode() for origin in origins]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one `http` scope."""
        origin = header(scope, b"origin")
        if origin is not None and self._origins:
            allowed = self._allowed(origin)
            if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
                await respond(send, b"", headers=[*allowed, *_preflight(scope)] if allowed else [])
                return
            if allowed:
                send = _with(send, allowed)
        if self._refused(scope):
            await refuse(send, self._app.refusal(scope, Unauthorized(NO_KEY)))
            return
        await self._app(scope, receive, send)

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`. A request with an origin to check, or one to refuse, is left to `__call__`."""
        if self._origins and header(scope, b"origin") is not None:
            return None
        if self._api_key is not None and self._refused(scope):
            return None
        return self._app.inline(scope, body, answer)

    def gate(self, scope: Scope) -> Gate | None:
        """See `GatedApp`. A request with an origin to check, or one to refuse, has no gate."""
        if self._origins and header(scope, b"origin") is not None:
            return None
        return None if self._refused(scope) else self._app.gate(scope)

    def crowded(self) -> Admission | None:
        """See `GatedApp`."""
        return self._app.crowded()

    def _refused(self, scope: Scope) -> bool:
        if self._api_key is None or self._app.open(scope):
            return False
        return not authorized(self._api_key, header(scope, b"authorization"), header(scope, b"x-api-key"))

    def _allowed(self, origin: bytes) -> list[Header]:
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin in self._origins:
            return [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", _EXPOSED),
                (b"vary", b"Origin"),
            ]
        return []


def _preflight(scope: Scope) -> list[Header]:
    wanted = header(scope, b"access-control-request-headers")
    return [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", wanted or b"content-type, authorization"),
        (b"access-control-max-age", _DAY),
    ]


def _with(send: Send, headers: Sequence[Header]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return sending
