"""What every HTTP protocol does alike: find the route, read the body, let the route answer, tell what went wrong."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

from inflight.errors import InflightError
from inflight.frontends.base import Backend
from inflight.frontends.llm import read_struct
from inflight.frontends.routes import Access, Call, Match, MethodNotAllowed, NoSuchRoute, Route, Table
from inflight.log import LOGGER
from inflight.metrics import SECONDS, Calls, RouteMetrics
from inflight.wire import (
    Answer,
    Body,
    Disconnected,
    Gate,
    Header,
    Message,
    Receive,
    Refusal,
    Scope,
    Send,
    header,
    nothing_to_cancel,
    read_body,
)

T = TypeVar("T")

Reply: TypeAlias = "tuple[int, list[Header], Sequence[Body]]"
"""One whole answer: status, headers without content-length, the body in parts."""
Done: TypeAlias = "Callable[[int, list[Header], Sequence[Body]], None]"
"""Takes a `Reply`; called once, on the loop."""

FORWARDED = "inflight.forwarded"
"""Key of a scope that another route has handed on, which counts it."""
UNKNOWN = "unknown"
"""Metrics' label of paths that are no route's."""
LEFT = 499
"""Metrics' status of calls whose client left before the answer began, as nginx has it."""
_VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_JOINED = 64 * 1024
"""Up to this size the parts of a body are joined: cheaper than a second system call."""


class Door(ABC):
    """One protocol over HTTP: an ASGI application, made of a table of routes and the protocol's words for errors.

    Each request gets exactly one answer, unless its client leaves first.

    Attributes:
        name: of the protocol, for people.
        routes: what it offers.
        below: every path that begins like one of these is its own, known or not.
        error: what a refusal holds, as msgspec describes it.
        always_200: errors may have that status.
        any_type: JSON is read whatever the content type says.
        offered: `routes`, and those that only this server has.
        metrics: counts the calls.
    """

    name: ClassVar[str]
    routes: ClassVar[Sequence[Route]]
    below: ClassVar[tuple[str, ...]] = ()
    error: ClassVar[Any] = Any
    always_200: ClassVar[bool] = False
    any_type: ClassVar[bool] = False

    def __init__(self, backend: Backend, more: Sequence[Route] = ()) -> None:
        """Args: more: routes that only this server has."""
        self._backend = backend
        self.offered = (*self.routes, *more)
        self.table = Table(self.offered)
        self.metrics = RouteMetrics(SECONDS)
        self._calls: dict[int, Calls] = {}  # by the route's identity: to hash a route costs more than to answer it

    @abstractmethod
    def refusal(self, error: InflightError) -> Refusal:
        """An error as one whole response, in the protocol's words."""

    @abstractmethod
    def limit(self, call: Call) -> int:
        """Bytes that the body of a call may have.

        Raises:
            InflightError: nobody can answer the call, whatever its body says.
        """

    def serves(self, scope: Scope) -> bool:
        """Whether a path below one of `below` is meant for this door, where several share it."""
        return True

    def find(self, scope: Scope) -> Match:
        """The route of a request.

        Raises:
            NoSuchRoute, MethodNotAllowed: there is none.
        """
        return self.table.find(scope, scope["path"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        unread = True
        began, send = time.perf_counter(), _Noted(send)
        route: Route | None = None
        try:
            route, names = self.find(scope)
            call = Call(scope, receive, send, route, names)
            if route.body is not None:
                limit = self.limit(call)
                if route.body is bytes:
                    call.replace(await read_body(scope, receive, limit))
                else:
                    call.replace(await read_struct(scope, receive, route.body, limit, any_type=self.any_type))
            unread = False
            await route.handler(self, call)
        except Disconnected:
            return
        except Exception as error:  # the outermost handler: whatever fails in here, the client gets an answer
            # Whether an expected body still comes is the client's choice, so nothing can follow it.
            await refuse(send, self.told(error, scope), last=unread and header(scope, b"expect") is not None)
        finally:
            if FORWARDED not in scope:
                calls = unknown_route(self.metrics, self.name, scope) if route is None else self.calls(route)
                calls.done(send.status, time.perf_counter() - began)

    def calls(self, route: Route) -> Calls:
        """Counts the calls of one of its routes."""
        calls = self._calls.get(id(route))
        if calls is None:
            calls = self._calls[id(route)] = self.metrics.http(self.name, route.path, route.verb)
        return calls

    def told(self, error: Exception, scope: Scope) -> Refusal:
        """Any error as a response; one that nobody meant is logged and told as such."""
        if not isinstance(error, InflightError):
            LOGGER.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            error = InflightError(self.internal(error))
        return self.refusal(error)

    def internal(self, error: Exception) -> str:
        """What a caller is told of an error that nobody meant."""
        return "internal server error, the server's log has the details"

    # Before the body is read

    def gate_for(self, scope: Scope) -> Gate | None:
        """Where a request has to pass before its body is read; None where it is for no language model."""
        try:
            route, names = self.find(scope)
        except (NoSuchRoute, MethodNotAllowed):
            return None
        return self.gate_of(route, names) if route.access is Access.PLACE else None

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        """The gate of a route that needs a place."""
        return None

    # Small requests, without a task

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        return None


class QuickDoor(Door):
    """A door whose answers come by a callback, so that a small request needs no task (`InlineApp`)."""

    @abstractmethod
    def quick(self, scope: Scope, size: int) -> Match | None:
        """The route of a request that may be answered without a task, and the names in its path; None for all others.

        Args:
            size: bytes of the body.
        """

    @abstractmethod
    def begin(self, scope: Scope, names: Mapping[str, str], body: Any, done: Done) -> Callable[[], None]:
        """Begins to answer a request that has been read. An error may be raised instead of told.

        Returns:
            How to cancel; doing so after the end does nothing.
        """

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        match = self.quick(scope, len(body))
        if match is None:
            return None
        route, names = match
        calls, began = self.calls(route), time.perf_counter()

        def told(status: int, headers: list[Header], parts: Sequence[Body]) -> None:
            calls.done(status, time.perf_counter() - began)
            answer(status, headers, b"".join(parts))

        return self._begun(scope, names, body, told)

    async def answered(self, call: Call) -> Reply:
        """The same for a request that has a task: its whole answer."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def done(status: int, headers: list[Header], parts: Sequence[Body]) -> None:
            if not reply.done():
                reply.set_result((status, headers, parts))

        cancel = self._begun(call.scope, call.names, call.body(), done)
        try:
            return await call.run(reply)
        finally:
            cancel()

    def finish(self, done: Done, scope: Scope, make: Callable[..., Reply], *given: Any) -> None:
        """Tells the answer that is made here, or the error that making it comes to."""
        try:
            reply = make(*given)
        except Exception as error:  # as in __call__
            reply = _reply(self.told(error, scope))
        done(*reply)

    def _begun(self, scope: Scope, names: Mapping[str, str], body: Any, done: Done) -> Callable[[], None]:
        try:
            return self.begin(scope, names, body, done)
        except Exception as error:  # as in __call__
            done(*_reply(self.told(error, scope)))
            return nothing_to_cancel


class _Noted:
    """A `send` that notes the status it sends.

    Attributes:
        status: 499 while there is none: the client left before.
    """

    __slots__ = ("_send", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = LEFT

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        return self._send(message)


def unknown_route(metrics: RouteMetrics, protocol: str, scope: Scope) -> Calls:
    """Counts calls of paths that a protocol does not have, or not with that verb."""
    verb = scope["method"]
    return metrics.http(protocol, UNKNOWN, verb if verb in _VERBS else "other")


def _reply(refusal: Refusal) -> Reply:
    return refusal.status, refusal.headers, (refusal.body,)


async def refuse(send: Send, refusal: Refusal, *, last: bool = False) -> None:
    """Answers with an error. Args: last: the connection ends with it."""
    headers = [*refusal.headers, (b"content-length", b"%d" % len(refusal.body))]
    if last:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers, "refused": True})
    await send({"type": "http.response.body", "body": refusal.body})


async def respond_parts(send: Send, status: int, headers: Sequence[Header], parts: Sequence[Body]) -> None:
    """One whole response; its parts leave one after the other, large ones as the views they are."""
    size = sum(map(len, parts))
    if len(parts) > 1 and size <= _JOINED:
        parts = [b"".join(parts)]
    length = (b"content-length", b"%d" % size)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})
