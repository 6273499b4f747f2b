"""The routes for operators of a server: health, metrics, the overview and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

from inflight.contract import reads_images
from inflight.errors import InflightError
from inflight.frontends.base import Backend
from inflight.frontends.door import Door
from inflight.frontends.openapi import DOCS_PAGE, openapi_document
from inflight.frontends.routes import Call, Plain, Route
from inflight.metrics import CONTENT_TYPE, Metrics
from inflight.version import __version__
from inflight.wire import JSON, Refusal, error_json, respond, respond_json


class Live(TypedDict):
    """Whether the server works."""

    live: bool


class Ready(TypedDict):
    """Whether everything can answer, and what cannot."""

    ready: bool
    not_ready: list[str]


class Overview(TypedDict):
    """What is served, and by which paths."""

    inflight: str
    servables: list[dict[str, Any]]
    paths: list[str]


class Operations(Door):
    """Answers these routes."""

    name = "Operations"

    def __init__(self, backend: Backend, metrics: Metrics, *, tgi: bool = False) -> None:
        """Args: tgi: `GET /` tells by its status whether everything can answer, as TGI's."""
        super().__init__(backend)
        self._metrics, self._tgi = metrics, tgi
        self.doors: Sequence[Door] = ()
        self._documents: dict[bool, bytes] = {}

    def refusal(self, error: InflightError) -> Refusal:
        return Refusal(error.http_status, [JSON, *error.headers], error_json(str(error)))

    def limit(self, call: Call) -> int:
        return 0

    async def _live(self, call: Call) -> None:
        """Answers 200 while the server works or starts, 503 while it stops."""
        live = self._backend.live
        await respond_json(call.send, {"live": live}, status=200 if live else 503)

    async def _ready(self, call: Call) -> None:
        """Answers 200 if every servable has a warm replica, else 503 with the names of those that have none."""
        ready = self._backend.ready
        missing = [f"{each.name}/{each.version}" for each in self._backend.servables() if not each.ready]
        answer: Ready = {"ready": ready, "not_ready": missing}
        await respond_json(call.send, answer, status=200 if ready else 503)

    async def _scrape(self, call: Call) -> None:
        """Answers with the metrics in Prometheus' text format."""
        await respond(call.send, self._metrics.render(), content_type=(b"content-type", CONTENT_TYPE.encode()))

    async def _document(self, call: Call) -> None:
        generators = bool(self._backend.generators)
        if generators not in self._documents:
            self._documents[generators] = openapi_document(self.doors, generators=generators)
        await respond(call.send, self._documents[generators])

    async def _page(self, call: Call) -> None:
        await respond(call.send, DOCS_PAGE, content_type=(b"content-type", b"text/html; charset=utf-8"))

    async def _overview(self, call: Call) -> None:
        servables = [
            {
                "name": each.name,
                "version": each.version,
                "ready": each.ready,
                "replicas": each.replicas,
                "ready_replicas": each.ready_replicas,
                "methods": [method.name for method in each.methods],
                "reads_images": any(reads_images(method) for method in each.methods),
            }
            for each in self._backend.servables()
        ]
        language = bool(self._backend.generators)
        offered = [route.path for door in self.doors for route in door.offered if language or not route.language]
        answer: Overview = {"inflight": __version__, "servables": servables, "paths": list(dict.fromkeys(offered))}
        await respond_json(call.send, answer, status=503 if self._tgi and not self._backend.ready else 200)

    routes: ClassVar[Sequence[Route]] = (
        Route("GET", "/", "What is served, and by which paths", _overview, answer=Overview, also={503: Overview}),
        Route("GET", "/health/live", "Whether the server works", _live, answer=Live, also={503: Live}),
        Route("GET", "/health/ready", "Whether everything can answer", _ready, answer=Ready, also={503: Ready}),
        Route("GET", "/metrics", "What was counted, for Prometheus", _scrape, answer=Plain()),
        Route("GET", "/openapi.json", "This list for programs, as OpenAPI 3.1", _document, answer=dict[str, Any]),
        Route("GET", "/api-doc/openapi.json", "The same by TGI's path", _document, answer=dict[str, Any]),
        Route("GET", "/docs", "The same for people", _page, answer=Plain(kind="text/html")),
    )
