"""Requests for language models before their bodies are read: whether they are let in, and the answer where not.

The policy is `inflight.admission`'s; here are the words of each protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from inflight.admission import Admission, Caller
from inflight.contract import Generator
from inflight.errors import OVERLOADED, InflightError, Overloaded
from inflight.wire.connections import LARGE_BODY
from inflight.wire.http.asgi import Header, Scope
from inflight.wire.http.body import too_large

UPLOADS = 64 << 20
"""Bytes of large bodies that may come in at a time for one model: they take no places while they come."""


@dataclass(frozen=True)
class Refusal:
    """One whole response, made once. Attributes: headers: without content-length."""

    status: int
    headers: list[Header]
    body: bytes


ToRefusal = Callable[[InflightError], Refusal]
"""An error in a protocol's form."""


@dataclass(frozen=True)
class Gate:
    """One protocol's way to one language model.

    Attributes:
        overloaded: what a request is told that finds no place; None where the form depends on its body.
        too_large: what a request is told whose body says that it is larger than `payload_limit` bytes.
    """

    admission: Admission
    payload_limit: int
    overloaded: Refusal | None
    too_large: Refusal | None

    def refusal(self, length: int, caller: Caller) -> Refusal | None:
        """The answer to a request that need not be read any further. Args: length: of its body, if that is to come."""
        if length > self.payload_limit:
            return self.too_large
        admission = self.admission
        busy = length >= LARGE_BODY and 0 < admission.uploading > UPLOADS - length
        if self.overloaded is not None and (busy or admission.full or admission.barred(caller)):
            admission.turned_away()
            return self.overloaded
        return None


def payload_limit(generator: Generator) -> int:
    """The model's own limit of a body, in bytes."""
    return generator.info.limits.payload_limit


class Gates:
    """The gates of one protocol, each made when it is first asked for.

    Args:
        told: an error in the protocol's form; None where the form depends on a request's body.
        limit: how many bytes a body for a model may have.
    """

    def __init__(self, told: ToRefusal | None, limit: Callable[[Generator], int] = payload_limit) -> None:
        self._told = told
        self._limit = limit
        self._gates: dict[Admission, Gate] = {}

    def of(self, generator: Generator) -> Gate | None:
        """The gate of this model; None while it is being loaded."""
        gate = self._gates.get(generator.admission)
        if gate is None and generator.info.loaded:
            limit = self._limit(generator)
            overloaded = large = None
            if self._told is not None:
                overloaded, large = self._told(Overloaded(OVERLOADED)), self._told(too_large(limit))
            gate = self._gates[generator.admission] = Gate(generator.admission, limit, overloaded, large)
        return gate


class GatedApp(Protocol):
    """An ASGI application that serves language models."""

    def gate(self, scope: Scope) -> Gate | None:
        """Where a request has to pass; None where it is for no language model, or for one that only its body names."""

    def crowded(self) -> Admission | None:
        """A model that takes nobody now, if there is one."""
