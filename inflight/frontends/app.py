"""The one HTTP port: every HTTP protocol by its path, health, metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from inflight import __version__
from inflight.admission import Admission
from inflight.config import RestConfig
from inflight.frontends.base import Backend
from inflight.frontends.cloud import CloudRest
from inflight.frontends.edge import Edge
from inflight.frontends.mindspore import GeneratorRest, MindSporeRest
from inflight.frontends.mindspore.llm import MindSporeLlm
from inflight.frontends.oip import OpenInferenceRest
from inflight.frontends.openai import OpenAiRest
from inflight.frontends.openapi import DOCS_PAGE, openapi_document
from inflight.frontends.routes import MethodNotAllowed, NoSuchRoute, error_headers, verb_of
from inflight.frontends.tgi import TgiRest
from inflight.metrics import CONTENT_TYPE, Metrics
from inflight.wire import Answer, App, Gate, Receive, Scope, Send, error_json, respond, respond_json


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

    What is not loaded yet is 503 in each protocol's own form; paths that nobody knows are 404, and known ones with
    another verb 405, except below `/model/`, where MindSpore Serving's habits hold.

    Args:
        max_body_bytes: limit of a request body, before and after it is unpacked.
        api_key, origins: see `Edge`.
    """
    tgi, openai, language = TgiRest(backend), OpenAiRest(backend), MindSporeLlm(backend)
    app = HttpApp(
        backend,
        OpenInferenceRest(backend, max_body_bytes=max_body_bytes),
        MindSporeRest(backend, max_body_bytes=max_body_bytes, config=rest),
        GeneratorRest(backend, max_body_bytes=max_body_bytes, config=rest),
        [Operations(backend, metrics), tgi, language, CloudRest(backend, tgi, openai)],
        {"/v1/": openai, "/models/": language},
    )
    return Edge(app, api_key, origins)


class Door(Protocol):
    """Who answers paths that are known as a whole.

    Attributes:
        paths: each with the verbs that it takes (HEAD goes with GET).
    """

    @property
    def paths(self) -> Mapping[str, Iterable[str]]: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope with such a path and verb."""


@runtime_checkable
class Gated(Protocol):
    """A door of language models."""

    def gate(self, scope: Scope) -> Gate | None:
        """Where a POST that it serves has to pass, if it has to."""


class HttpApp:
    """Sends each request to the protocol its path belongs to.

    Args:
        generators: language models by MindSpore Serving's URLs.
        doors: several may share a path, each with verbs of its own.
        below: who answers every path that begins like this, with 404 or 405 where it must be.
    """

    def __init__(
        self,
        backend: Backend,
        oip: OpenInferenceRest,
        mindspore: MindSporeRest,
        generators: GeneratorRest,
        doors: Sequence[Door],
        below: Mapping[str, App],
    ) -> None:
        self._backend = backend
        self._oip = oip
        self._mindspore = mindspore
        self._generators = generators
        self._below: Mapping[str, App] = {"/v2/": oip, **below}
        self._paths: dict[str, dict[str, App]] = {"/v2": {"GET": oip}}
        for door in doors:
            for path, verbs in door.paths.items():
                for verb in verbs:
                    self._paths.setdefault(path, {}).setdefault(verb, door)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        try:
            app = self._app(scope)
        except MethodNotAllowed as error:
            await respond(send, error_json(str(error)), status=error.http_status, headers=error_headers(error))
        except NoSuchRoute as error:
            # Scripts written for MindSpore Serving look for its words, whatever the status.
            words = f"please check url, the keyword:[model] must contain. {error}"
            await respond_json(send, {"error": str(error), "error_msg": words}, status=error.http_status)
        else:
            await app(scope, receive, send)

    def _app(self, scope: Scope) -> App:
        """Who answers a request.

        Raises:
            NoSuchRoute, MethodNotAllowed: nobody does.
        """
        path: str = scope["path"]
        # Parts in this order too are MindSpore Serving's: /version/1/model/<servable>:<method>.
        if path.startswith(("/model/", "/version/")):
            return self._generators if self._generators.serves(scope) else self._mindspore
        verbs = self._paths.get(path)
        if verbs is None:
            found = next((app for start, app in self._below.items() if path.startswith(start)), None)
        else:
            found = verbs.get(verb_of(scope))
            if found is None:
                raise MethodNotAllowed(scope, verbs)
        if found is not None:
            return found
        raise NoSuchRoute(f"there is no route {path}; GET / names what there is, and /docs explains it")

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`."""
        if scope["method"] != "POST":
            return None
        path: str = scope["path"]
        if path.startswith("/model/"):
            return None if self._generators.serves(scope) else self._mindspore.inline(scope, body, answer)
        return self._oip.inline(scope, body, answer) if path.startswith("/v2/") else None

    def gate(self, scope: Scope) -> Gate | None:
        """See `GatedApp`."""
        if scope["method"] != "POST" or not self._backend.generators:
            return None
        try:
            app = self._app(scope)
        except (MethodNotAllowed, NoSuchRoute):
            return None
        return app.gate(scope) if isinstance(app, Gated) else None

    def crowded(self) -> Admission | None:
        """See `GatedApp`."""
        for generator in self._backend.generators.values():
            if generator.admission.full:
                return generator.admission
        return None


class Operations:
    """What those who run a server ask of it. `paths` says which page answers which path."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self.paths: Mapping[str, Mapping[str, Callable[[Send], Awaitable[None]]]] = {
            "/": {"GET": self.overview},
            "/health/live": {"GET": self.live},
            "/health/ready": {"GET": self.ready},
            "/metrics": {"GET": self.scrape},
            "/openapi.json": {"GET": self.document},
            "/api-doc/openapi.json": {"GET": self.document},
            "/docs": {"GET": self.page},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for one of these pages."""
        await self.paths[scope["path"]][verb_of(scope)](send)

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
