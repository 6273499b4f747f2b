"""The routes of the HTTP port as data: a `Route` for each verb and path, a `Table` for each protocol.

Dispatch, `405` with `Allow`, the API key, places in a model's line, the OpenAPI document, the overview at `/` and the
lists in the documentation are all made from these tables.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, TypeVar

from inflight.errors import (
    Anthropic,
    InvalidRequest,
    NotFound,
    OpenAi,
    Tgi,
)
from inflight.wire import Receive, Scope, Send, run_until_disconnect

T = TypeVar("T")

Handler: TypeAlias = "Callable[[Any, Call], Awaitable[None]]"
"""Answers a call; its first argument is the door."""

"""In seconds: about the time in which a queue drains or a small model loads."""

KEPT = 1024
"""Number of paths with names in them whose routes are remembered."""


class Access(Enum):
    """The condition for calls of a route."""

    OPEN = "open"  # none
    KEY = "key"  # the server's API key, if it has one
    ADMIN = "admin"  # the same; web pages may call it only if their origin is listed by name
    PLACE = "place"  # the key, and a place for the request in the language model (`wire.Gate`)


class Events(Enum):
    """Whether a route answers with server-sent events."""

    NEVER = "never"
    ASKED = "asked"  # if the body or the headers ask for them
    ALWAYS = "always"


@dataclass(frozen=True)
class Plain:
    """An answer that is not JSON. Attributes: text: the only text that it can be; None: any text."""

    text: str | None = None
    kind: str = "text/plain"


@dataclass
class Call:
    """One request on its way through a door.

    Attributes:
        names: the values of the names in the route's path.
    """

    scope: Scope
    receive: Receive
    send: Send
    route: Route
    names: Mapping[str, str]
    _body: Any = None

    def body(self) -> Any:
        """The body, read as `Route.body` says. It is returned once and then forgotten, since it may be large and the
        answer may take long."""
        body, self._body = self._body, None
        return body

    def replace(self, body: Any) -> None:
        """Sets the body that `body` returns."""
        self._body = body

    async def run(self, work: Awaitable[T]) -> T:
        """Awaits the work of an answer and cancels it if the client leaves (`Disconnected`)."""
        return await run_until_disconnect(work, self.receive)


@dataclass(frozen=True)
class Route:
    """One verb and path that can be called.

    Attributes:
        verb: HEAD belongs to GET.
        path: `{name}` is one part of it, `{name*}` any number of parts at its end; `[...]` may be left out.
        about: one line for people.
        handler: answers the call.
        body: how the request's body is read before the handler is called: a struct, `bytes` for the body unchanged,
            None for not at all.
        shown: for a body that the handler reads itself (`bytes`): its type in the OpenAPI document, for msgspec.
        answer: the type of a good answer, for msgspec, or `Plain`.
        also: further statuses that are not refusals, with the types of their bodies.
        error: the type of a refusal's body, if it is not the door's own.
        language: the route exists only if language models are served.
    """

    verb: str
    path: str
    about: str
    handler: Handler
    body: type | None = None
    shown: Any = None
    answer: Any = Any
    also: Mapping[int, Any] | None = None
    events: Events = Events.NEVER
    access: Access = Access.OPEN
    language: bool = False
    error: Any = None

    @property
    def paths(self) -> list[str]:
        """The path with and without its optional parts; the shortest first."""
        found = [self.path]
        while any("[" in path for path in found):
            found = [
                made
                for path in found
                for made in (re.sub(r"\[[^][]*\]", "", path, count=1), re.sub(r"\[([^][]*)\]", r"\1", path, count=1))
            ]
        return found


def generation(
    path: str,
    about: str,
    handler: Handler,
    body: type,
    answer: Any = Any,
    events: Events = Events.NEVER,
    shown: Any = None,
    error: Any = None,
) -> Route:
    """A route that a language model answers."""
    return Route("POST", path, about, handler, body, shown, answer, None, events, Access.PLACE, True, error)


Match: TypeAlias = "tuple[Route, Mapping[str, str]]"
"""A route, and the values of the names in its path."""


class Table:
    """The routes of one protocol, by path and verb."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._named: list[tuple[list[str], dict[str, Route]]] = []
        self._kept: dict[str, dict[str, Match]] = {}
        named: dict[str, dict[str, Route]] = {}
        for route in routes:
            for path in route.paths:
                (named if "{" in path else self._exact).setdefault(path, {})[route.verb] = route
        self._named = [(path.split("/")[1:], verbs) for path, verbs in named.items()]

    @property
    def exact(self) -> Mapping[str, Mapping[str, Route]]:
        """Routes without a name in their path, by path and verb."""
        return self._exact

    def find(self, scope: Scope, path: str, parts: Sequence[str] | None = None) -> Match:
        """The route of a request.

        Args:
            path: the request's path.
            parts: another reading of the path's parts; None: `path` is split.

        Raises:
            NoSuchRoute, MethodNotAllowed: there is none.
        """
        verb = verb_of(scope)
        if parts is None:
            kept = self._kept.get(path)
            if kept is not None and verb in kept:
                return kept[verb]
        found = self._match(path, parts)
        if not found:
            raise NoSuchRoute(f"there is no route {path}; GET / names what there is, and /docs explains it")
        if verb not in found:
            raise MethodNotAllowed(scope, found)
        if parts is None and len(self._kept) < KEPT:
            self._kept[path] = found
        return found[verb]

    def _match(self, path: str, parts: Sequence[str] | None) -> dict[str, Match]:
        exact = self._exact.get(path)
        if exact is not None:
            return {verb: (route, {}) for verb, route in exact.items()}
        found: dict[str, Match] = {}
        given = path.split("/")[1:] if parts is None else parts
        for wanted, verbs in self._named:
            names = _names(wanted, given)
            if names is not None:
                for verb, route in verbs.items():
                    found.setdefault(verb, (route, names))
        return found


def _names(wanted: Sequence[str], given: Sequence[str]) -> dict[str, str] | None:
    """The values of the names in a path; None if the path does not match."""
    rest = wanted[-1].endswith("*}")
    if len(given) < len(wanted) if rest else len(given) != len(wanted):
        return None
    names: dict[str, str] = {}
    for part, value in zip(wanted, given):
        if part.startswith("{"):
            names[part.strip("{*}")] = value
        elif part != value:
            return None
    if rest:
        names[wanted[-1].strip("{*}")] = "/".join(given[len(wanted) - 1 :])
    return names


class NoSuchRoute(NotFound):
    """No route has the path."""

    openai = OpenAi(404, "invalid_request_error", "unknown_url")


class MethodNotAllowed(InvalidRequest):
    """The path has routes, but not with this verb.

    Args:
        allowed: the verbs of its routes.
    """

    http_status = 405
    tgi = Tgi(405, "validation")
    openai = OpenAi(405, "invalid_request_error")
    anthropic = Anthropic(405, "invalid_request_error")

    def __init__(self, scope: Scope, allowed: Iterable[str]) -> None:
        self.allowed = [each for verb in sorted(allowed) for each in ((verb, "HEAD") if verb == "GET" else (verb,))]
        self.headers = ((b"allow", ", ".join(self.allowed).encode()),)
        super().__init__(f"{scope['path']} takes {' or '.join(self.allowed)}, not {scope['method']}")


def verb_of(scope: Scope) -> str:
    """The request's verb; HEAD is a GET whose body the connection leaves out."""
    verb: str = scope["method"]
    return "GET" if verb == "HEAD" else verb
