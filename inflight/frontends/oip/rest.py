"""The REST door of the Open Inference Protocol, version 2, with those of Triton's extensions that clients rely on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar
from urllib.parse import unquote

import orjson

from inflight.admission import priority
from inflight.contract import KnownModel, MethodInfo, ModelState, Outcome
from inflight.errors import RETRY_AFTER, InflightError, InvalidRequest, Loading
from inflight.frontends.base import Backend
from inflight.frontends.control import Control
from inflight.frontends.door import Done, QuickDoor, Reply, respond_parts
from inflight.frontends.oip.binary import InferRequest, encode_response, parse_request
from inflight.frontends.oip.bodies import (
    ChangeBody,
    Extension,
    GenerateExtension,
    IndexBody,
    IndexEntry,
    InferAnswer,
    InferBody,
    ModelReady,
    OipError,
    OipLive,
    OipReady,
)
from inflight.frontends.oip.classes import classified
from inflight.frontends.oip.llm import answer_generate, read_generate, stream_generate
from inflight.frontends.oip.mapping import (
    ModelMetadata,
    ModelNames,
    check_wanted,
    find_model,
    from_outcomes,
    metadata,
    model_ready,
    to_rows,
)
from inflight.frontends.oip.reports import (
    EXTENSIONS,
    LOG,
    NO_LOG,
    NO_MEMORY,
    NO_TRACE,
    TRACE,
    TotalsOf,
    model_config,
    model_statistics,
)
from inflight.frontends.oip.sequences import Sequences, describing
from inflight.frontends.oip.tensors import OipTensor
from inflight.frontends.routes import (
    Access,
    Call,
    Events,
    Match,
    MethodNotAllowed,
    NoSuchRoute,
    Route,
)
from inflight.metrics import Totals
from inflight.version import __version__
from inflight.wire import (
    JSON,
    MESSAGE_OPTION,
    Body,
    Gate,
    Gates,
    Refusal,
    Scope,
    accepted_encoding,
    header,
    pack,
    respond_json,
    unpack,
)

_HEADER_LENGTH = b"inference-header-content-length"
_RAW = (b"content-type", b"application/octet-stream")
_PACKED = (b"gzip", b"deflate")


class OpenInferenceRest(QuickDoor):
    """Answers every path under `/v2` with JSON, followed by raw tensors if requested."""

    name = "Open Inference Protocol"
    below = ("/v2/",)
    error = OipError

    def __init__(
        self,
        backend: Backend,
        *,
        max_body_bytes: int,
        control: Control | None = None,
        totals: TotalsOf = lambda servable, method: Totals(),
        sequences: Sequences | None = None,
    ) -> None:
        super().__init__(backend)
        self._totals = totals
        self._control = control or Control(backend)
        self._submit = backend.submit
        self._max_body_bytes = max_body_bytes
        self._models = ModelNames(backend)
        self._sequences = sequences or Sequences(backend)
        self._gates = Gates(self.refusal, lambda model: max_body_bytes, MESSAGE_OPTION)

    def refusal(self, error: InflightError) -> Refusal:
        told: OipError = {"error": str(error)}
        return Refusal(error.http_status, [JSON, *error.headers], orjson.dumps(told))

    def find(self, scope: Scope) -> Match:
        path: str = scope["path"]
        raw: bytes = scope.get("raw_path") or path.encode()
        if b"%" not in raw:
            return self.table.find(scope, path.rstrip("/"))
        return self.table.find(scope, path, ["v2", *self._parts(raw)])

    def limit(self, call: Call) -> int:
        if "name" in call.names and call.route.access is Access.PLACE:
            self._method(call.names)
        return self._max_body_bytes

    def gate_of(self, route: Route, names: Mapping[str, str]) -> Gate | None:
        generator = self._backend.generators.get(names["name"])
        return self._gates.of(generator) if generator is not None else None

    def quick(self, scope: Scope, size: int) -> Match | None:
        if size > self._max_body_bytes or _is_packed(scope):
            return None
        try:
            match = self.find(scope)
        except (NoSuchRoute, MethodNotAllowed):
            return None
        return match if match[0].path.endswith("/infer") else None

    def begin(self, scope: Scope, names: Mapping[str, str], body: Body, done: Done) -> Callable[[], None]:
        method = self._method(names)
        request = parse_request(body, _json_length(scope))
        if method.stateful:
            return self._begin_stateful(scope, names, method, request, done)
        rows = to_rows(method, request.inputs)
        check_wanted(method, request.outputs)
        request.inputs.clear()  # only the rows hold them: a cancelled request then frees them at once
        labels = self._labels(method, request)
        finish = partial(self.finish, done, scope, _reply, names["name"], method, request, labels)
        if not request.priority:
            return self._submit(method, rows, finish, timeout=request.timeout)
        token = priority.set(request.priority)
        try:
            return self._submit(method, rows, finish, timeout=request.timeout)
        finally:
            priority.reset(token)

    def _labels(self, method: MethodInfo, request: InferRequest) -> Mapping[str, Sequence[str]]:
        """The labels of the outputs that are wanted as classifications."""
        if not request.classes:
            return {}
        says = describing(self._backend, method)
        return {name: says.labels(name) if says is not None else () for name in request.classes}

    def _begin_stateful(
        self, scope: Scope, names: Mapping[str, str], method: MethodInfo, request: InferRequest, done: Done
    ) -> Callable[[], None]:
        """As `begin`, for a request of a sequence, which waits for the one before it."""
        check_wanted(method, request.outputs)
        labels = self._labels(method, request)

        async def run() -> None:
            try:
                tensors = await self._sequences.run(
                    method, request.part, request.inputs, request.timeout, request.outputs
                )
            except Exception as error:  # as in __call__
                self.finish(done, scope, _raise, error)
            else:
                self.finish(done, scope, _encoded, names["name"], method, request, labels, tensors)

        token = priority.set(request.priority)
        try:
            task = asyncio.ensure_future(run())
        finally:
            priority.reset(token)

        def cancel() -> None:
            task.cancel()

        return cancel

    def _parts(self, raw: bytes) -> list[str]:
        """The path's parts below `/v2`, percent-decoded; a model's name is not decoded if a model has the undecoded
        name."""
        parts = raw.decode("ascii", "replace").strip("/").split("/")[1:]
        literal = parts[:1] == ["models"] and len(parts) > 1 and self._knows(parts[1])
        return [part if literal and index == 1 else unquote(part) for index, part in enumerate(parts)]

    def _knows(self, name: str) -> bool:
        try:
            find_model(self._backend, name, "")
        except Loading:
            return True
        except InflightError:
            return False
        return True

    def _method(self, names: Mapping[str, str]) -> MethodInfo:
        return self._models.find(names["name"], names.get("version", ""))

    async def _about(self, call: Call) -> None:
        told: Extension = {"name": "inflight", "version": __version__, "extensions": list(EXTENSIONS)}
        await respond_json(call.send, told)

    async def _live(self, call: Call) -> None:
        live = self._backend.live
        await respond_json(call.send, {"live": live}, status=200 if live else 503)

    async def _ready(self, call: Call) -> None:
        ready = self._backend.ready
        await respond_json(call.send, {"ready": ready}, status=200 if ready else 503)

    async def _metadata(self, call: Call) -> None:
        names = call.names
        await respond_json(call.send, asdict(metadata(self._backend, names["name"], names.get("version", ""))))

    async def _config(self, call: Call) -> None:
        await respond_json(call.send, model_config(self._backend, call.names["name"], call.names.get("version", "")))

    async def _statistics(self, call: Call) -> None:
        name, version = call.names.get("name", ""), call.names.get("version", "")
        await respond_json(call.send, model_statistics(self._backend, self._totals, name, version))

    async def _trace(self, call: Call) -> None:
        """Tells the settings of traces; changing one is refused."""
        if "name" in call.names:
            find_model(self._backend, call.names["name"], "")
        if call.route.verb == "POST" and _json_body(call):
            raise InvalidRequest(NO_TRACE)
        told = {name: values if name == "trace_level" else values[0] for name, values in TRACE.items()}
        await respond_json(call.send, told)

    async def _log(self, call: Call) -> None:
        """Tells the settings of the log; changing one is refused."""
        if call.route.verb == "POST" and _json_body(call):
            raise InvalidRequest(NO_LOG)
        await respond_json(call.send, LOG)

    async def _regions(self, call: Call) -> None:
        await respond_json(call.send, [])

    async def _register(self, call: Call) -> None:
        raise InvalidRequest(NO_MEMORY)

    async def _unregister(self, call: Call) -> None:
        await respond_json(call.send, {})

    async def _model_ready(self, call: Call) -> None:
        name = call.names["name"]
        ready = model_ready(self._backend, name, call.names.get("version", ""))
        answer: ModelReady = {"name": name, "ready": ready}
        await respond_json(call.send, answer, status=200 if ready else 503, headers=[] if ready else [RETRY_AFTER])

    async def _infer(self, call: Call) -> None:
        call.replace(await unpack(call.scope, call.body(), self._max_body_bytes))
        status, headers, parts = await self.answered(call)
        encoding = accepted_encoding(call.scope) if status == 200 else None
        if encoding is not None:
            headers = [*headers, (b"content-encoding", encoding.encode())]
            parts = [await pack(parts, encoding)]
        await respond_parts(call.send, status, headers, parts)

    async def _generate(self, call: Call) -> None:
        await self._generated(call, answer_generate)

    async def _stream(self, call: Call) -> None:
        await self._generated(call, stream_generate)

    async def _generated(self, call: Call, work: Callable[..., Awaitable[None]]) -> None:
        method = self._method(call.names)
        row, common = read_generate(self._backend, method, await unpack(call.scope, call.body(), self._max_body_bytes))
        await work(self._backend, method, row, common, call.receive, call.send)

    async def _index(self, call: Call) -> None:
        """Lists every model of every version; without those that are not ready if the body asks for ready ones only."""
        asked = _json_body(call)
        await respond_json(
            call.send, [_index_entry(each) for each in await self._control.index(asked.get("ready") is True)]
        )

    async def _load(self, call: Call) -> None:
        await call.run(self._control.load(call.names["name"], _parameters(call)))
        await respond_json(call.send, {})

    async def _unload(self, call: Call) -> None:
        await self._control.unload(call.names["name"], _parameters(call))
        await respond_json(call.send, {})

    routes: ClassVar[Sequence[Route]] = (
        Route("GET", "/v2", "The server and its extensions", _about, answer=Extension),
        Route("GET", "/v2/health/live", "Whether the server works", _live, answer=OipLive, also={503: OipLive}),
        Route(
            "GET", "/v2/health/ready", "Whether everything can answer", _ready, answer=OipReady, also={503: OipReady}
        ),
        Route(
            "POST",
            "/v2/repository[/{repository}]/index",
            "Every model",
            _index,
            bytes,
            shown=IndexBody,
            answer=list[IndexEntry],
        ),
        Route(
            "POST",
            "/v2/repository[/{repository}]/models/{name}/load",
            "Load a model, or load it again",
            _load,
            bytes,
            shown=ChangeBody,
            answer=dict[str, Any],
            access=Access.ADMIN,
        ),
        Route(
            "POST",
            "/v2/repository[/{repository}]/models/{name}/unload",
            "Unload a model",
            _unload,
            bytes,
            shown=ChangeBody,
            answer=dict[str, Any],
            access=Access.ADMIN,
        ),
        Route("GET", "/v2/models/{name}[/versions/{version}]", "A model", _metadata, answer=ModelMetadata),
        Route("GET", "/v2/models/{name}[/versions/{version}]/config", "How a model is run", _config),
        Route("GET", "/v2/models/{name}[/versions/{version}]/stats", "What a model has done", _statistics),
        Route("GET", "/v2/models/stats", "What all models have done", _statistics),
        Route("GET", "/v2[/models/{name}]/trace/setting", "The settings of traces", _trace),
        Route("POST", "/v2[/models/{name}]/trace/setting", "The same; changes are refused", _trace, bytes),
        Route("GET", "/v2/logging", "The settings of the log", _log),
        Route("POST", "/v2/logging", "The same; changes are refused", _log, bytes),
        Route("GET", "/v2/systemsharedmemory[/region/{region}]/status", "Regions of shared memory: none", _regions),
        Route("POST", "/v2/systemsharedmemory/region/{region}/register", "Shared memory is refused", _register, bytes),
        Route(
            "POST", "/v2/systemsharedmemory[/region/{region}]/unregister", "Nothing to unregister", _unregister, bytes
        ),
        Route("GET", "/v2/cudasharedmemory[/region/{region}]/status", "Regions of shared memory: none", _regions),
        Route("POST", "/v2/cudasharedmemory/region/{region}/register", "Shared memory is refused", _register, bytes),
        Route("POST", "/v2/cudasharedmemory[/region/{region}]/unregister", "Nothing to unregister", _unregister, bytes),
        Route(
            "GET",
            "/v2/models/{name}[/versions/{version}]/ready",
            "Whether a model can answer",
            _model_ready,
            answer=ModelReady,
            also={503: ModelReady},
        ),
        Route(
            "POST",
            "/v2/models/{name}[/versions/{version}]/infer",
            "Run a model",
            _infer,
            bytes,
            shown=InferBody,
            answer=InferAnswer,
            access=Access.PLACE,
        ),
        Route(
            "POST",
            "/v2/models/{name}[/versions/{version}]/generate",
            "Generate",
            _generate,
            bytes,
            shown=GenerateExtension,
            answer=dict[str, Any],
            access=Access.PLACE,
        ),
        Route(
            "POST",
            "/v2/models/{name}[/versions/{version}]/generate_stream",
            "Generate, text by text",
            _stream,
            bytes,
            shown=GenerateExtension,
            events=Events.ALWAYS,
            access=Access.PLACE,
        ),
    )


def _json_body(call: Call) -> dict[str, Any]:
    """The object in a body; an empty body is an empty object."""
    body = call.body()
    try:
        document = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request is not valid JSON: {error}") from None
    return document if isinstance(document, dict) else {}


def _parameters(call: Call) -> dict[str, Any]:
    parameters = _json_body(call).get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest("'parameters' must be an object")
    return parameters


def _index_entry(model: KnownModel) -> IndexEntry:
    entry: IndexEntry = {"name": model.name}
    if model.version:
        entry["version"] = str(model.version)
    if model.state is not ModelState.KNOWN:
        entry["state"] = model.state.value
    if model.reason:
        entry["reason"] = model.reason
    return entry


def _is_packed(scope: Scope) -> bool:
    """Whether the body is compressed or the client accepts a compressed answer."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" or (name == b"accept-encoding" and value.strip().lower() in _PACKED):
            return True
    return False


def _reply(
    name: str,
    method: MethodInfo,
    request: InferRequest,
    labels: Mapping[str, Sequence[str]],
    result: Sequence[Outcome] | InflightError,
) -> Reply:
    if isinstance(result, InflightError):
        raise result
    return _encoded(name, method, request, labels, from_outcomes(method, result, request.outputs))


def _raise(error: Exception) -> Reply:
    raise error


def _encoded(
    name: str,
    method: MethodInfo,
    request: InferRequest,
    labels: Mapping[str, Sequence[str]],
    tensors: Sequence[OipTensor],
) -> Reply:
    if request.classes:
        tensors = [
            classified(tensor, request.classes[tensor.name], labels[tensor.name], method.whole)
            if tensor.name in request.classes
            else tensor
            for tensor in tensors
        ]
    parts, raw = encode_response(name, method.version, request, tensors)
    return 200, [_RAW, (_HEADER_LENGTH, b"%d" % len(parts[0]))] if raw else [JSON], parts


def _json_length(scope: Scope) -> int | None:
    value = header(scope, _HEADER_LENGTH)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be the bytes of the JSON part, not {value.decode('latin-1')!r}"
        )
    return int(value)
