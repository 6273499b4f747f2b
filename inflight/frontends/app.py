"""The one HTTP port: every HTTP protocol by its path, health, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from inflight import __version__
from inflight.config import RestConfig
from inflight.frontends.asgi import Answer, Receive, Scope, Send, respond, respond_json
from inflight.frontends.base import Backend
from inflight.frontends.cloud import CloudRest
from inflight.frontends.edge import Edge
from inflight.frontends.mindspore_llm import MindSporeLlm
from inflight.frontends.oip import OpenInferenceRest
from inflight.frontends.openai import OpenAiRest
from inflight.frontends.openapi import DOCS_PAGE, openapi_document
from inflight.frontends.rest import GeneratorRest, MindSporeRest
from inflight.frontends.tgi import TgiRest
from inflight.metrics import CONTENT_TYPE, Metrics


def http_app(
    backend: Backend,
    *,
    max_body_bytes: int,
    rest: RestConfig,
    metrics: Metrics,
    api_key: str | None = None,
    origins: Sequence[str] = (),
) -> Edge:
    """An ASGI application for `http` scopes.

    `/v2` and below is the Open Inference Protocol. Where a language model is served, TGI's and OpenAI's routes answer
    for it, and `/model/<its name>:generate`. `GET` of `/health/live`, `/health/ready`, `/metrics` and `/` is
    answered here; everything else is MindSpore Serving's REST, errors for unknown paths included.

    Args:
        max_body_bytes: limit of a request body, before and after it is unpacked.
        api_key, origins: see `Edge`.
    """
    tgi, openai = TgiRest(backend), OpenAiRest(backend)
    app = HttpApp(
        OpenInferenceRest(backend, max_body_bytes=max_body_bytes),
        MindSporeRest(backend, max_body_bytes=max_body_bytes, config=rest),
        Operations(backend, metrics),
        backend,
        (
            tgi,
            openai,
            GeneratorRest(backend, rest.status_codes),
            MindSporeLlm(backend),
            CloudRest(backend, tgi, openai),
        ),
    )
    return Edge(app, api_key, origins)


class GenerationDoor(Protocol):
    """A protocol of language models."""

    def serves(self, scope: Scope) -> bool:
        """Whether a request is for one of its routes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope that it serves."""


class HttpApp:
    """Sends each request to the protocol its path belongs to."""

    def __init__(
        self,
        oip: OpenInferenceRest,
        mindspore: MindSporeRest,
        operations: Operations,
        backend: Backend,
        generation: Sequence[GenerationDoor],
    ) -> None:
        self._oip = oip
        self._mindspore = mindspore
        self._operations = operations
        self._backend = backend
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        path: str = scope["path"]
        if _is_oip(path):
            await self._oip(scope, receive, send)
        elif path in self._operations.paths and scope["method"] in ("GET", "HEAD"):
            await self._operations.paths[path](send)
        elif (door := self._generating(scope)) is not None:
            await door(scope, receive, send)
        else:
            await self._mindspore(scope, receive, send)

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        if scope["method"] != "POST" or self._generating(scope) is not None:
            return None
        if _is_oip(scope["path"]):
            return self._oip.inline(scope, body, answer)
        return self._mindspore.inline(scope, body, answer)

    def _generating(self, scope: Scope) -> GenerationDoor | None:
        """The door of language models that this request is for."""
        if not self._backend.generators:
            return None
        for door in self._generation:
            if door.serves(scope):
                return door
        return None


def _is_oip(path: str) -> bool:
    return path.startswith("/v2/") or path == "/v2"


class Operations:
    """What those who run a server ask of it. `paths` says which page answers which path."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self.paths = {
            "/": self.overview,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/metrics": self.scrape,
            "/openapi.json": self.document,
            "/api-doc/openapi.json": self.document,
            "/docs": self.page,
        }

    async def live(self, send: Send) -> None:
        """200 while the server works or starts, 503 while it stops."""
        live = self._backend.live
        await respond_json(send, {"live": live}, status=200 if live else 503)

    async def ready(self, send: Send) -> None:
        """200 where every servable has a warm replica, else 503 and which ones do not."""
        ready = self._backend.ready
        missing = [f"{each.name}/{each.version}" for each in self._backend.servables() if not each.ready]
        await respond_json(send, {"ready": ready, "not_ready": missing}, status=200 if ready else 503)

    async def scrape(self, send: Send) -> None:
        """Prometheus' text format."""
        await respond(send, self._metrics.render(), content_type=(b"content-type", CONTENT_TYPE.encode()))

    async def document(self, send: Send) -> None:
        """What can be called, as OpenAPI 3.1."""
        await respond(send, openapi_document(generators=bool(self._backend.generators)))

    async def page(self, send: Send) -> None:
        """The same for people."""
        await respond(send, DOCS_PAGE, content_type=(b"content-type", b"text/html; charset=utf-8"))

    async def overview(self, send: Send) -> None:
        """What is served here."""
        servables = [
            {
                "name": each.name,
                "version": each.version,
                "ready": each.ready,
                "replicas": each.replicas,
                "ready_replicas": each.ready_replicas,
                "methods": [method.name for method in each.methods if not method.name.startswith("@")],
            }
            for each in self._backend.servables()
        ]
        paths = [
            "/model/<servable>[/version/<n>]:<method>",
            "/v2",
            "/health/live",
            "/health/ready",
            "/metrics",
            "/docs",
        ]
        if self._backend.generators:
            paths += ["/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/v1/models", "/info"]
        await respond_json(send, {"inflight": __version__, "servables": servables, "paths": paths})
