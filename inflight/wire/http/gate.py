"""Gates decide from its head whether a request for a language model is let in, and hold the response if it is not.

The policy is in `inflight.admission`; a gate has the responses in the form of one protocol.
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
"""Bytes of large bodies that may be received at a time for one model. A request takes a place only after its body."""


PAYLOAD_OPTION = "--payload-limit"
"""The option that sets the size of a body for a language model."""


@dataclass(frozen=True)
class Refusal:
    """A complete response, serialized once. Attributes: headers: all but Content-Length."""

    status: int
    headers: list[Header]
    body: bytes


ToRefusal = Callable[[InflightError], Refusal]
"""An error in a protocol's form."""


@dataclass(frozen=True)
class Gate:
    """Lets one protocol's requests in to one language model.

    Attributes:
        overloaded: response to a request that finds no place; None if its form depends on the request's body.
        too_large: response to a request whose Content-Length is above `payload_limit` bytes; None likewise.
    """

    admission: Admission
    payload_limit: int
    overloaded: Refusal | None
    too_large: Refusal | None

    @property
    def bounds_uploads(self) -> bool:
        """Whether at most `UPLOADS` bytes of large bodies come in at a time: it refuses more from their heads."""
        return self.overloaded is not None

    def refusal(self, length: int, caller: Caller) -> Refusal | None:
        """The response to a request that is refused; None where it is let in. Args: length: bytes of body to come."""
        if length > self.payload_limit:
            return self.too_large
        admission, large = self.admission, length >= LARGE_BODY
        if length:
            admission.sees(caller, large)
        busy = large and (0 < admission.uploading > UPLOADS - length or admission.gorged(caller))
        if self.overloaded is not None and (busy or admission.full or admission.barred(caller)):
            admission.turned_away()
            return self.overloaded
        return None


def payload_limit(generator: Generator) -> int:
    """The model's size limit of a request body, in bytes."""
    return generator.info.limits.payload_limit


class Gates:
    """The gates of one protocol by model, each made at its first request.

    Args:
        told: puts an error in the protocol's form; None if the form depends on a request's body.
        limit: returns the bytes that a body for a model may have.
        option: the server's option that sets this limit.
    """

    def __init__(
        self,
        told: ToRefusal | None,
        limit: Callable[[Generator], int] = payload_limit,
        option: str = PAYLOAD_OPTION,
    ) -> None:
        self._told = told
        self._limit = limit
        self._option = option
        self._gates: dict[Admission, Gate] = {}

    def of(self, generator: Generator) -> Gate | None:
        """The gate of this model; None while it is being loaded."""
        gate = self._gates.get(generator.admission)
        if gate is None and generator.info.loaded:
            limit = self._limit(generator)
            overloaded = large = None
            if self._told is not None:
                overloaded, large = self._told(Overloaded(OVERLOADED)), self._told(too_large(limit, self._option))
            gate = self._gates[generator.admission] = Gate(generator.admission, limit, overloaded, large)
        return gate


class GatedApp(Protocol):
    """An ASGI application that serves language models."""

    def gate(self, scope: Scope) -> Gate | None:
        """The gate of a request's model; None if the request is for another servable, or its body names the model."""

    def crowded(self) -> Admission | None:
        """The admission of a model that has no place for some request; None if every model has one for all."""
