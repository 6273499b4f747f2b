"""What the doors of HTTP say of a request that none of their routes takes, and of one that should come again."""

from __future__ import annotations

from collections.abc import Iterable

from inflight.errors import InflightError, InvalidRequest, NotFound, Overloaded, Unavailable
from inflight.wire import Header, Scope

RETRY_AFTER: Header = (b"retry-after", b"1")
"""Seconds: a queue drains, and a small model loads, in about that."""


class NoSuchRoute(NotFound):
    """Nobody knows the path."""


class MethodNotAllowed(InvalidRequest):
    """The path is known, and takes other verbs.

    Args:
        allowed: the verbs that it takes.
    """

    http_status = 405

    def __init__(self, scope: Scope, allowed: Iterable[str]) -> None:
        self.allowed = [each for verb in allowed for each in ((verb, "HEAD") if verb == "GET" else (verb,))]
        super().__init__(f"{scope['path']} takes {' or '.join(self.allowed)}, not {scope['method']}")


def verb_of(scope: Scope) -> str:
    """The request's verb; HEAD is a GET whose body the connection leaves out."""
    verb: str = scope["method"]
    return "GET" if verb == "HEAD" else verb


def check_verb(scope: Scope, allowed: str) -> None:
    """Raises MethodNotAllowed for every other verb than this one."""
    if verb_of(scope) != allowed:
        raise MethodNotAllowed(scope, [allowed])


def error_headers(error: InflightError) -> list[Header]:
    """Headers beside an error's status: when to come again, or what the path takes."""
    if isinstance(error, (Overloaded, Unavailable)):
        return [RETRY_AFTER]
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", ", ".join(error.allowed).encode())]
    return []
