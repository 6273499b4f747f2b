"""The base class of doors that answer errors as TGI does."""

from __future__ import annotations

from inflight.errors import InflightError
from inflight.frontends.base import Backend
from inflight.frontends.door import Door
from inflight.frontends.tgi.answers import TgiError
from inflight.frontends.tgi.response import refusal
from inflight.wire import PAYLOAD_OPTION, Gates, Refusal


class TgiDoor(Door):
    """Answers errors as TGI does, also those of a full language model."""

    error = TgiError
    size_option = PAYLOAD_OPTION

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._gates = Gates(refusal)

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)
