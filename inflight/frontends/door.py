"""The base classes of HTTP protocols: find the route, read the body, call the route's handler, answer errors."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

from inflight.admission import arrival
from inflight.config import PAYLOAD_LIMIT
from inflight.contract import NEWEST, Generator
from inflight.errors import InflightError, InvalidRequest
from inflight.frontends.base import Backend
from inflight.frontends.directory import Directory, named_in, sticky, user_of
from inflight.frontends.llm import payload_limit, pick, read_struct
from inflight.frontends.routes import Access, Call, Match, MethodNotAllowed, NoSuchRoute, Route, Table
from inflight.log import LOGGER
from inflight.metrics import SECONDS, Calls, LlmMetrics, RouteMetrics
from inflight.wire import (
    MESSAGE_OPTION,
    PAYLOAD_OPTION,
    Answer,
    Body,
    Disconnected,
    Gate,
    Gates,
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
"""Key of a scope that another route has forwarded; that route counts the call."""
UNKNOWN = "unknown"
"""Metrics' label for paths without a route."""
LEFT = 499
"""Metrics' status for calls whose client left before the answer began, as in nginx."""
_VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_JOINED = 64 * 1024
"""Up to this size the parts of a body are joined: cheaper than a second system call."""


class Door(ABC):
    """One protocol over HTTP: an ASGI application made of a table of routes and the protocol's form of errors.

    Each request gets exactly one answer, unless its client leaves first.

    Attributes:
        name: the protocol's name, for people.
        routes: the protocol's routes.
        below: prefixes; every path that begins with one belongs to this door, known or not.
        error: type of a refusal's body, as msgspec describes it.
        always_200: errors may have the status 200.
        any_type: the body is read as JSON whatever its content type.
        whole_floats: fields of a body that hold whole numbers may be written as `3.0`.
        size_option: the server's option that sets what `limit` returns.
        offered: `routes`, and those that only this server has.
        metrics: counts the calls.
        generations: counts requests that are refused before a language model sees them; None: nobody counts them.
        directory: names in bodies that mean more than the models that are served; None: there are none.
    """

    name: ClassVar[str]
    routes: ClassVar[Sequence[Route]]
    below: ClassVar[tuple[str, ...]] = ()
    error: ClassVar[Any] = Any
    always_200: ClassVar[bool] = False
    any_type: ClassVar[bool] = False
    whole_floats: ClassVar[bool] = False
    size_option: ClassVar[str] = MESSAGE_OPTION

    def __init__(self, backend: Backend, more: Sequence[Route] = ()) -> None:
        """Args: more: routes that only this server has."""
        self._backend = backend
        self.offered = (*self.routes, *more)
        self.table = Table(self.offered)
        self.metrics = RouteMetrics(SECONDS)
        self.generations: LlmMetrics | None = None
        self.directory: Directory | None = None
        self._calls: dict[int, Calls] = {}  # by the route's identity: to hash a route costs more than to answer it

    @abstractmethod
    def refusal(self, error: InflightError) -> Refusal:
        """An error as one whole response, in the protocol's words."""

    @abstractmethod
    def limit(self, call: Call) -> int:
        """The largest body of a call, in bytes.

        Raises:
            InflightError: the call cannot be answered, whatever its body says.
        """

    def serves(self, scope: Scope) -> bool:
        """Whether this door answers a request whose prefix in `below`, or whose path and verb, another door has too."""
        return True

    def find(self, scope: Scope) -> Match:
        """The route of a request.

        Raises:
            NoSuchRoute, MethodNotAllowed: there is none.
        """
        return self.table.find(scope, scope["path"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one `http` scope."""
        unread = True
        began, send = time.perf_counter(), _Noted(send)
        route: Route | None = None
        try:
            route, names = self.find(scope)
            call = Call(scope, receive, send, route, names)
            if route.body is not None:
                limit = self.limit(call)
                if route.body is bytes:
                    call.replace(await read_body(scope, receive, limit, self.size_option))
                else:
                    option, any_type, floats = self.size_option, self.any_type, self.whole_floats
                    call.replace(
                        await read_struct(
                            scope, receive, route.body, limit, option, any_type=any_type, whole_floats=floats
                        )
                    )
            unread = False
            if self.directory is not None:
                await self._direct(call, self.directory)
            await route.handler(self, call)
        except Disconnected:
            return
        except Exception as error:  # the outermost handler: whatever fails above, the client gets an answer
            self._count_refusal(route, error)
            # After a refusal a client with `expect` may or may not send the body, so the connection has to end.
            await refuse(send, self.told(error, scope), last=unread and header(scope, b"expect") is not None)
        finally:
            if FORWARDED not in scope:
                calls = unknown_route(self.metrics, self.name, scope) if route is None else self.calls(route)
                calls.done(send.status, time.perf_counter() - began)

    async def _direct(self, call: Call, directory: Directory) -> None:
        """Writes the model behind an alias into the body that names one, and waits until the model of the request is
        loaded: the default language model where it names none. A path's model was waited for before, but may have had
        to leave while the body came.

        Raises:
            InflightError: it is not loaded, or not in time.
        """
        if call.route.body is None:
            return
        path = named_in(call.scope)
        if path is not None and path.wakes and directory.missing(path.name):
            await call.run(directory.present(path.name))
        if "name" in call.names or not call.route.language:
            return
        body = call.body()
        call.replace(body)
        name = getattr(body, "model", None)
        if isinstance(name, str) and name:
            version = NEWEST
            chosen = directory.chosen(name, sticky(call.scope) or user_of(body))
            if chosen is not None:
                name, version = chosen
                body.model = name
            await self._present(call, directory, name)
            if version != NEWEST:  # what is loaded is known only now
                body.model = directory.named(name, version)
            if self._backend.generators:
                return
        if directory.default is not None:
            await self._present(call, directory, directory.default)

    async def _present(self, call: Call, directory: Directory, name: str) -> None:
        """Waits until a model is loaded. Raises InflightError: it is not, or not in time."""
        if directory.missing(name):
            if (kept := arrival.get()) is not None:
                kept.settle()  # its gate was another model's, which may have to leave for this one
            await call.run(directory.present(name))

    def _payload_limit(self) -> int:
        """The largest body in bytes where no language model is loaded yet that the request may load."""
        if self.directory is not None and not self._backend.generators:
            return PAYLOAD_LIMIT
        return payload_limit(self._backend)

    def _count_refusal(self, route: Route | None, error: Exception) -> None:
        """Counts a request of a language model that no model has seen. A body of another form is no request."""
        if self.generations is None or route is None or route.access is not Access.PLACE:
            return
        if isinstance(error, InvalidRequest) and not error.counted:
            self.generations.refused(error.failure)

    def calls(self, route: Route) -> Calls:
        """The counter of one route's calls."""
        calls = self._calls.get(id(route))
        if calls is None:
            calls = self._calls[id(route)] = self.metrics.http(self.name, route.path, route.verb)
        return calls

    def told(self, error: Exception, scope: Scope) -> Refusal:
        """Any error as a response; an unexpected one is logged and answered with `internal`'s text."""
        if not isinstance(error, InflightError):
            LOGGER.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            error = InflightError(self.internal(error))
        return self.refusal(error)

    def internal(self, error: Exception) -> str:
        """The text that a client gets for an unexpected error."""
        return "internal server error, the server's log has the details"

    # Before the body is read

    def gate_for(self, scope: Scope) -> Gate | None:
        """The gate that a request has to pass before its body is read; None if it needs no language model."""
        try:
            route, names = self.find(scope)
        except (NoSuchRoute, MethodNotAllowed):
            return None
        return self.gate_of(route, names) if route.access is Access.PLACE else None

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        """The gate of a route whose access is `Access.PLACE`."""
        return None

    # Small requests, without a task

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        return None


class NamedModelDoor(Door):
    """A door of language models whose requests name the model in their body."""

    size_option = PAYLOAD_OPTION

    def __init__(self, backend: Backend, more: Sequence[Route] = ()) -> None:
        super().__init__(backend, more)
        self._gates, self._gates_of_several = Gates(self.refusal), Gates(None)

    def limit(self, call: Call) -> int:
        return self._payload_limit()

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        """The gate of the only model; of several, that of a full one, without refusals: only the body names a model."""
        first, *more = self._backend.generators.values()
        if not more:
            return self._gates.of(first)
        return self._gates_of_several.of(next((one for one in more if one.admission.full), first))


class FirstModelDoor(Door):
    """A door of the first model that is served: of its gate and its limits. Some routes may name another model."""

    size_option = PAYLOAD_OPTION

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._gates = Gates(self.refusal)

    def limit(self, call: Call) -> int:
        if not self._backend.generators:
            return self._payload_limit()
        return self._generator.info.limits.payload_limit

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        return self._gates.of(next(iter(self._backend.generators.values())))

    @property
    def _generator(self) -> Generator:
        return pick(self._backend)


class QuickDoor(Door):
    """A door that answers through a callback, so that a small request needs no task (`InlineApp`)."""

    @abstractmethod
    def quick(self, scope: Scope, size: int) -> Match | None:
        """The route of a request that may be answered without a task, and the names in its path; None for all other
        requests.

        Args:
            size: bytes of the body.
        """

    @abstractmethod
    def begin(self, scope: Scope, names: Mapping[str, str], body: Any, done: Done) -> Callable[[], None]:
        """Starts to answer a request that has been read. It calls `done`, or raises an error instead.

        Returns:
            A function that cancels the request; after the end it does nothing.
        """

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        match = self.quick(scope, len(body))
        if match is None:
            return None
        route, names = match
        calls, began = self._calls.get(id(route)) or self.calls(route), time.perf_counter()

        def told(status: int, headers: list[Header], parts: Sequence[Body]) -> None:
            calls.done(status, time.perf_counter() - began)
            answer(status, headers, b"".join(parts))

        return self._begun(scope, names, body, told)

    async def answered(self, call: Call) -> Reply:
        """The whole answer of a request that has a task."""
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
        """Calls `done` with the answer that `make` returns, or with the error that it raises."""
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
        status: `LEFT` until one is sent.
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
    """The counter of calls whose path a protocol does not have, or not with that verb."""
    verb = scope["method"]
    return metrics.http(protocol, UNKNOWN, verb if verb in _VERBS else "other")


def _reply(refusal: Refusal) -> Reply:
    return refusal.status, refusal.headers, (refusal.body,)


async def refuse(send: Send, refusal: Refusal, *, last: bool = False) -> None:
    """Answers with an error. Args: last: the connection ends after it."""
    headers = [*refusal.headers, (b"content-length", b"%d" % len(refusal.body))]
    if last:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers, "refused": True})
    await send({"type": "http.response.body", "body": refusal.body})


async def respond_parts(send: Send, status: int, headers: Sequence[Header], parts: Sequence[Body]) -> None:
    """Sends one whole response, part by part; large parts are sent as views, without a copy."""
    size = sum(map(len, parts))
    if len(parts) > 1 and size <= _JOINED:
        parts = [b"".join(parts)]
    length = (b"content-length", b"%d" % size)
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})
