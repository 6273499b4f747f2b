"""The application of the HTTP port: every HTTP protocol by its paths, health, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module

from inflight.admission import Admission, holder
from inflight.config import RestConfig
from inflight.errors import ConfigError, InflightError
from inflight.frontends.anthropic import AnthropicRest
from inflight.frontends.base import Backend
from inflight.frontends.cloud import CloudRest
from inflight.frontends.control import Control
from inflight.frontends.directory import Directory, named_in, redirect
from inflight.frontends.door import UNKNOWN, Door, refuse, unknown_route
from inflight.frontends.edge import Edge
from inflight.frontends.keys import Keys
from inflight.frontends.mindspore import LlmMethods, LlmRoutes, MindSporeRest
from inflight.frontends.oip import OpenInferenceRest, Sequences
from inflight.frontends.openai import OpenAiRest
from inflight.frontends.operations import Operations
from inflight.frontends.ranking import RankingRest
from inflight.frontends.routes import Access, MethodNotAllowed, NoSuchRoute, verb_of
from inflight.frontends.tei import TeiRest
from inflight.frontends.tgi import TgiRest
from inflight.metrics import Metrics, RouteMetrics
from inflight.wire import JSON, Answer, Gate, Receive, Refusal, Scope, Send, error_json, header

DOORS: tuple[type[Door], ...] = (
    MindSporeRest,
    LlmMethods,
    LlmRoutes,
    OpenInferenceRest,
    TgiRest,
    CloudRest,
    OpenAiRest,
    AnthropicRest,
    TeiRest,
    RankingRest,
    Operations,
)
"""Every protocol over HTTP; each lists its `routes`."""


def http_app(
    backend: Backend,
    *,
    max_body_bytes: int,
    rest: RestConfig,
    metrics: Metrics,
    keys: Keys | None = None,
    origins: Sequence[str] = (),
    protocols: Sequence[type[Door]] = (),
    control: Control | None = None,
    directory: Directory | None = None,
    sequences: Sequences | None = None,
) -> Edge:
    """The ASGI application for `http` scopes.

    A servable that is not loaded yet is answered with 503 in each protocol's own form, an unknown path with 404, a
    known path with another verb with 405. Below `/model/` MindSpore Serving's rules hold instead.

    Args:
        max_body_bytes: limit of a request body, before and after decompression.
        keys, origins: see `Edge`.
        protocols: further protocols; the constructor of each takes the backend alone.
        control: loads and unloads models; None: nobody can.
        directory: names that mean more than the models that are served; None: there are none.
        sequences: of stateful models, for all doors of a server; None: this one has its own.

    Raises:
        ConfigError: one of `protocols` has a path of another protocol.
    """
    tgi, openai, operations = (
        TgiRest(backend),
        OpenAiRest(backend, tgi=rest.tgi, control=control),
        Operations(backend, metrics, tgi=rest.tgi),
    )
    doors: tuple[Door, ...] = (
        LlmMethods(backend, max_body_bytes=max_body_bytes, config=rest),
        MindSporeRest(backend, max_body_bytes=max_body_bytes, config=rest),
        LlmRoutes(backend),
        OpenInferenceRest(
            backend, max_body_bytes=max_body_bytes, control=control, totals=metrics.totals, sequences=sequences
        ),
        tgi,
        CloudRest(backend, tgi, openai, rest),
        openai,
        AnthropicRest(backend),
        TeiRest(backend),
        RankingRest(backend),
        operations,
    )
    for protocol in protocols:
        doors = (*doors, _distinct(protocol(backend), doors))
    for door in doors:
        door.metrics, door.generations, door.directory = metrics.routes, metrics.generations, directory
    operations.doors = sorted(doors, key=lambda door: DOORS.index(type(door)) if type(door) in DOORS else len(DOORS))
    return Edge(HttpApp(backend, doors, metrics.routes, directory, keys is not None), keys, origins)


def load_protocol(name: str) -> type[Door]:
    """Imports a protocol by its name, `module:Class`.

    Raises:
        ConfigError: there is no such class, or it does not derive from `Door`.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the protocol '{name}' cannot be imported: {error}; write module:Class") from error
    if not isinstance(found, type) or not issubclass(found, Door):
        raise ConfigError(f"the protocol '{name}' is no class of inflight.frontends.Door; derive it from that")
    return found


def _distinct(door: Door, others: Sequence[Door]) -> Door:
    """Checks that a door shares no path with the others, and returns it.

    Raises:
        ConfigError: another door has one of its paths.
    """
    for other in others:
        shared = {*door.table.exact, *door.below} & {*other.table.exact, *other.below}
        if shared:
            raise ConfigError(f"the protocol '{door.name}' has the path {min(shared)}, which is '{other.name}'s")
    return door


class HttpApp:
    """Sends each request to the door that has its path.

    Args:
        doors: several may share a path, each with verbs of its own; of two with the same path and verb the second gets
            what it `serves`; below a common prefix the first door that `serves` the request gets it.
        metrics: counts requests that no door has a route for.
        directory: see `http_app`.
        keyed: only callers with an API key make models load.
    """

    def __init__(
        self,
        backend: Backend,
        doors: Sequence[Door],
        metrics: RouteMetrics,
        directory: Directory | None = None,
        keyed: bool = False,
    ) -> None:
        self._metrics = metrics
        self._keyed = keyed
        self._directory = directory
        self._backend = backend
        self._below: dict[str, list[Door]] = {}
        for door in doors:
            for start in door.below:
                self._below.setdefault(start, []).append(door)
        self._exact: dict[str, dict[str, Door]] = {}
        self._also: dict[str, dict[str, Door]] = {}  # second doors of a path and verb
        for door in doors:
            for path, verbs in door.table.exact.items():
                for verb in verbs:
                    if self._exact.setdefault(path, {}).setdefault(verb, door) is not door:
                        self._also.setdefault(path, {})[verb] = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one `http` scope."""
        try:
            if self._directory is not None:
                await self._direct(scope, self._directory)
            door = self._door(scope)
        except MethodNotAllowed as error:
            unknown_route(self._metrics, UNKNOWN, scope).done(error.http_status, 0.0)
            await refuse(send, Refusal(error.http_status, [JSON, *error.headers], error_json(str(error))))
        except NoSuchRoute as error:
            unknown_route(self._metrics, UNKNOWN, scope).done(error.http_status, 0.0)
            # Scripts written for MindSpore Serving search the text for its words, whatever the status.
            words = f"please check url, the keyword:[model] must contain. {error}"
            await refuse(send, Refusal(error.http_status, [JSON], error_json(str(error), words)))
        except InflightError as error:  # the model that the path names cannot be loaded
            unknown_route(self._metrics, UNKNOWN, scope).done(error.http_status, 0.0)
            await refuse(send, self.refusal(scope, error), last=header(scope, b"expect") is not None)
        else:
            await door(scope, receive, send)

    async def _direct(self, scope: Scope, directory: Directory) -> None:
        """Writes the model behind an alias into the path, and waits until the model that the path names is loaded.

        Raises:
            InflightError: it is not, or not in time.
        """
        redirect(scope, directory)
        found = named_in(scope)
        if found is not None and found.wakes and (holder.get() is not None or not self._keyed):
            await directory.present(found.name)

    def _door(self, scope: Scope) -> Door:
        """The door that answers a request.

        Raises:
            NoSuchRoute, MethodNotAllowed: there is none.
        """
        path: str = scope["path"]
        verbs = self._exact.get(path)
        if verbs is None:
            for door in self._below.get(path[: path.find("/", 1) + 1], ()):
                if door.serves(scope):
                    return door
            raise NoSuchRoute(f"there is no route {path}; GET / names what there is, and /docs explains it")
        found = verbs.get(verb_of(scope))
        if found is None:
            raise MethodNotAllowed(scope, verbs)
        if path in self._also:
            second = self._also[path].get(verb_of(scope))
            return second if second is not None and second.serves(scope) else found
        return found

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`. A request whose model may have to be loaded first is left to `__call__`."""
        if self._directory is not None:
            redirect(scope, self._directory)
            found = named_in(scope)
            if found is not None and self._directory.missing(found.name):
                return None
        try:
            door = self._door(scope)
        except (MethodNotAllowed, NoSuchRoute):
            return None
        return door.inline(scope, body, answer)

    @property
    def gated(self) -> bool:
        """See `EdgeApp`."""
        return bool(self._backend.generators)

    def gate(self, scope: Scope) -> Gate | None:
        """See `GatedApp`."""
        if scope["method"] != "POST" or not self._backend.generators:
            return None
        if self._directory is not None:
            redirect(scope, self._directory)
        try:
            return self._door(scope).gate_for(scope)
        except (MethodNotAllowed, NoSuchRoute):
            return None

    def crowded(self) -> Admission | None:
        """See `GatedApp`."""
        for generator in self._backend.generators.values():
            if generator.admission.crowded:
                return generator.admission
        return None

    def refusal(self, scope: Scope, error: InflightError) -> Refusal:
        """See `EdgeApp`."""
        try:
            told = self._door(scope).refusal(error)
            # Below /model/ errors of requests may have the status 200; a caller without access sees its own.
            return replace(told, status=error.http_status) if told.status == 200 else told
        except (MethodNotAllowed, NoSuchRoute):
            return Refusal(error.http_status, [JSON, *error.headers], error_json(str(error)))

    def changes(self, scope: Scope) -> bool:
        """See `EdgeApp`. A preflight asks for the request that it announces."""
        wanted = header(scope, b"access-control-request-method") if scope["method"] == "OPTIONS" else None
        verb = scope["method"] if wanted is None else wanted.decode("latin-1")
        try:
            asked: Scope = {**scope, "method": verb}
            route, _ = self._door(asked).find(asked)
        except InflightError:
            return False
        return route.access is Access.ADMIN

    def open(self, scope: Scope) -> bool:
        """Whether a request needs no API key. A POST to an unknown path needs it: without it the answer is 401, not
        404."""
        if scope["method"] != "POST":
            return True
        try:
            route, _ = self._door(scope).find(scope)
        except (MethodNotAllowed, NoSuchRoute):
            return False
        return route.access is Access.OPEN
