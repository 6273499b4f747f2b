"""Access checks before every HTTP route: API keys, and the web pages that may call (CORS)."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Protocol

from inflight.admission import Admission, holder
from inflight.errors import Forbidden, InflightError
from inflight.frontends.door import refuse
from inflight.frontends.keys import Key, Keys
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
    bearer,
    header,
    respond,
)

_EXPOSED = b"x-compute-type, x-compute-time, x-total-time, x-inference-time, x-generated-tokens, x-prompt-tokens"
_DAY = b"86400"


class EdgeApp(InlineApp, GatedApp, Protocol):
    """The application behind an `Edge`."""

    @property
    def gated(self) -> bool:
        """Whether any request has a gate."""

    def open(self, scope: Scope) -> bool:
        """Whether a request needs no API key."""

    def changes(self, scope: Scope) -> bool:
        """Whether a request is one of those that change what is served."""

    def refusal(self, scope: Scope, error: InflightError) -> Refusal:
        """An error in the form of the request's protocol."""


class Edge:
    """An application behind a key and a list of origins.

    Whoever runs a browser beside a server runs pages of strangers beside it, and a page may send a POST anywhere; but
    the browser tells its origin. So a request with an origin changes nothing here unless that is listed by name, or the
    page is the server's own (`/docs`) at a numeric address or `localhost`, which no stranger's name can stand for.

    Args:
        keys: those that routes require unless they are open; None: all are open.
        origins: web pages of these origins may call; `*` is any, except for what changes the server; empty: none.
    """

    def __init__(self, app: EdgeApp, keys: Keys | None, origins: Sequence[str]) -> None:
        self._app = app
        self._keys = keys
        self._any = "*" in origins
        self._origins = [origin.rstrip("/").encode() for origin in origins]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one `http` scope."""
        origin = header(scope, b"origin")
        if origin is not None and not self._may_change(scope, origin) and self._app.changes(scope):
            error = Forbidden(
                "web pages may not load or unload models here; list the page's origin with --cors-allow-origin"
            )
            await refuse(send, self._app.refusal(scope, error))
            return
        if origin is not None and self._origins:
            allowed = self._allowed(origin)
            if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
                await respond(send, b"", headers=[*allowed, *_preflight(scope)] if allowed else [])
                return
            if allowed:
                send = _with(send, allowed)
        try:
            key = self._key(scope)
            ticket = key.enter() if key is not None else None
        except InflightError as error:
            await refuse(send, self._app.refusal(scope, error))
            return
        if ticket is None:
            await self._app(scope, receive, send)
            return
        token = holder.set(key)
        try:
            await self._app(scope, receive, send)
        finally:
            holder.reset(token)
            ticket.leave()

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`. A request with an origin to check, or one to refuse, is left to `__call__`."""
        if self._origins and header(scope, b"origin") is not None:
            return None
        if self._keys is None:
            return self._app.inline(scope, body, answer)
        try:
            key = self._key(scope)
        except InflightError:
            return None
        if key is None:
            return self._app.inline(scope, body, answer)
        if key.limited:  # it is watched until the answer's end
            return None
        token = holder.set(key)
        try:
            cancel = self._app.inline(scope, body, answer)
        finally:
            holder.reset(token)
        if cancel is not None:
            key.count()
        return cancel

    def gate(self, scope: Scope) -> Gate | None:
        """See `GatedApp`. A request with an origin to check, or one to refuse, has no gate."""
        if not self._app.gated or (self._origins and header(scope, b"origin") is not None):
            return None
        if self._keys is not None:
            try:
                self._key(scope)
            except InflightError:
                return None
        return self._app.gate(scope)

    def crowded(self) -> Admission | None:
        """See `GatedApp`."""
        return self._app.crowded()

    def _key(self, scope: Scope) -> Key | None:
        """The key of a request; None where it needs none.

        Raises:
            InflightError: it shows none that is known.
        """
        if self._keys is None or self._app.open(scope):
            return None
        return self._keys.find(bearer(header(scope, b"authorization"), header(scope, b"x-api-key")))

    def _may_change(self, scope: Scope, origin: bytes) -> bool:
        return origin in self._origins or _own_page(origin, header(scope, b"host") or b"")

    def _allowed(self, origin: bytes) -> list[Header]:
        if self._any and origin not in self._origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin in self._origins:
            return [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", _EXPOSED),
                (b"vary", b"Origin"),
            ]
        return []


def _own_page(origin: bytes, host: bytes) -> bool:
    """Whether a page is of this server. A host with a name does not count: a stranger's may lead here."""
    if origin.partition(b"://")[2] != host:
        return False
    name, _, port = host.decode("latin-1").rpartition(":")
    if not (name and port.isdecimal()):
        name = host.decode("latin-1")
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


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
