"""The REST door of the Open Inference Protocol, version 2, with Triton's extensions its clients count on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import unquote

import orjson

from inflight import __version__
from inflight.errors import InflightError, InvalidRequest, Loading
from inflight.frontends.base import Backend, callbacks
from inflight.frontends.oip.binary import InferRequest, encode_response, parse_request
from inflight.frontends.oip.generate import answer_generate, read_generate, stream_generate
from inflight.frontends.oip.mapping import (
    check_wanted,
    find_model,
    from_outcomes,
    infer,
    metadata,
    model_ready,
    parse_version,
    to_rows,
)
from inflight.frontends.routes import RETRY_AFTER, NoSuchRoute, check_verb, error_headers
from inflight.types import MethodInfo, Outcome
from inflight.wire import (
    JSON,
    Answer,
    Body,
    Disconnected,
    Gate,
    Gates,
    Header,
    Receive,
    Refusal,
    Scope,
    Send,
    accepted_encoding,
    header,
    nothing_to_cancel,
    pack,
    read_body,
    respond_json,
    run_until_disconnect,
    unpack,
)

_logger = logging.getLogger("inflight.oip")
_HEADER_LENGTH = b"inference-header-content-length"
_EXTENSIONS = ["binary_tensor_data", "model_repository", "generate"]
_RAW = (b"content-type", b"application/octet-stream")
_JOINED = 64 * 1024
_PACKED = (b"gzip", b"deflate")
_NAMES_KEPT = 1024
_RUNNING = ("infer", "generate", "generate_stream")


class OpenInferenceRest:
    """Answers every path under `/v2`. Each request gets one JSON answer (with raw tensors behind it where wanted)
    unless its client leaves first."""

    def __init__(self, backend: Backend, *, max_body_bytes: int) -> None:
        self._backend = backend
        self._max_body_bytes = max_body_bytes
        self._callbacks = callbacks(backend)
        self._names: dict[tuple[str, str], tuple[str, int, str]] = {}
        self._gates = Gates(_refusal, lambda model: max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One `http` scope."""
        try:
            await self._route(scope, receive, send)
        except Disconnected:
            return
        except InflightError as error:
            await respond_json(send, {"error": str(error)}, status=error.http_status, headers=error_headers(error))
        except Exception:  # the outermost handler: the client gets an answer whatever fails in here
            _logger.exception("an error nobody handled, %s %s", scope["method"], scope["path"])
            await respond_json(send, {"error": "internal server error, the server's log has the details"}, status=500)

    def gate(self, scope: Scope) -> Gate | None:
        """Where requests for language models have to pass."""
        parts = self._parts(scope)
        if len(parts) not in (3, 5) or parts[0] != "models" or parts[-1] not in _RUNNING:
            return None
        generator = self._backend.generators.get(parts[1])
        return self._gates.of(generator) if generator is not None else None

    def inline(self, scope: Scope, body: bytes, answer: Answer) -> Callable[[], None] | None:
        """See `InlineApp`: plain inferences, with the backend's callback in place of waiting for it."""
        parts = self._parts(scope)
        if (
            self._callbacks is None
            or len(body) > self._max_body_bytes
            or parts[:1] != ["models"]
            or parts[-1] != "infer"
        ):
            return None
        if len(parts) not in (3, 5) or (len(parts) == 5 and parts[2] != "versions") or _is_packed(scope):
            return None
        try:
            method = self._find(parts[1], parts[3] if len(parts) == 5 else "")
            request = parse_request(body, _json_length(scope))
            rows = to_rows(method, request.inputs)
            check_wanted(method, request.outputs)
            done = partial(_finish, parts[1], method, request, answer)
            return self._callbacks.submit(method, rows, done, timeout=request.timeout)
        except InflightError as error:
            _answer_error(answer, error)
        except Exception as error:  # as in __call__
            _answer_error(answer, _internal(scope["path"], error))
        return nothing_to_cancel

    def _parts(self, scope: Scope) -> list[str]:
        """The path's parts below `/v2`, percent-decoded; a model's name only where it is not served as it came."""
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        parts = raw.decode("ascii", "replace").strip("/").split("/")[1:]
        if b"%" not in raw:
            return parts
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

    def _find(self, name: str, version: str) -> MethodInfo:
        """`find_model`, which looks at every servable, only for names that were not asked for before."""
        known = self._names.get((name, version))
        if known is not None:
            try:
                return self._backend.method(*known)
            except InflightError:
                del self._names[name, version]
        method = find_model(self._backend, name, version)
        if len(self._names) < _NAMES_KEPT:
            self._names[name, version] = (method.servable, parse_version(version), method.name)
        return method

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = self._parts(scope)
        if parts[:1] == ["models"] and len(parts) > 1:
            await self._model(scope, receive, send, parts[1], parts[2:])
        elif not parts:
            check_verb(scope, "GET")
            await respond_json(send, {"name": "inflight", "version": __version__, "extensions": _EXTENSIONS})
        elif parts in (["health", "live"], ["health", "ready"]):
            check_verb(scope, "GET")
            good = self._backend.live if parts[1] == "live" else self._backend.ready
            await respond_json(send, {parts[1]: good}, status=200 if good else 503)
        elif parts == ["repository", "index"]:
            check_verb(scope, "POST")
            await self._index(scope, receive, send)
        else:
            raise _no_such_path(scope)

    async def _model(self, scope: Scope, receive: Receive, send: Send, name: str, rest: list[str]) -> None:
        version = ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        if rest == ["infer"]:
            check_verb(scope, "POST")
            await self._infer(scope, receive, send, name, version)
        elif rest in (["generate"], ["generate_stream"]):
            check_verb(scope, "POST")
            method = self._find(name, version)
            body = await unpack(scope, await read_body(scope, receive, self._max_body_bytes), self._max_body_bytes)
            row, common = read_generate(method, body)
            del body  # a generation takes long
            work = answer_generate if rest == ["generate"] else stream_generate
            await work(self._backend, method, row, common, receive, send)
        elif not rest:
            check_verb(scope, "GET")
            await respond_json(send, asdict(metadata(self._backend, name, version)))
        elif rest == ["ready"]:
            check_verb(scope, "GET")
            ready = model_ready(self._backend, name, version)
            await respond_json(
                send,
                {"name": name, "ready": ready},
                status=200 if ready else 503,
                headers=[] if ready else [RETRY_AFTER],
            )
        else:
            raise _no_such_path(scope)

    async def _infer(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        method = self._find(name, version)
        body = await read_body(scope, receive, self._max_body_bytes)
        body = await unpack(scope, body, self._max_body_bytes)
        request = parse_request(body, _json_length(scope))
        del body  # the inputs view what they need of it
        work = infer(self._backend, method, request.inputs, request.outputs, timeout=request.timeout)
        tensors = await run_until_disconnect(work, receive)
        parts, raw = encode_response(name, method.version, request, tensors)
        await _send(scope, send, parts, raw)

    async def _index(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every model of every version, also those that are not ready unless only ready ones are asked for."""
        body = await read_body(scope, receive, self._max_body_bytes)
        try:
            asked = orjson.loads(body) if body else {}
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the request is not valid JSON: {error}") from None
        only_ready = isinstance(asked, dict) and asked.get("ready") is True
        models = []
        for status in self._backend.servables():
            if only_ready and not status.ready:
                continue
            reason = "no replica is ready" if status.loaded else "it is still being loaded"
            state = {"state": "READY"} if status.ready else {"state": "UNAVAILABLE", "reason": reason}
            models.append({"name": status.name, "version": str(status.version), **state})
        await respond_json(send, models)


def _is_packed(scope: Scope) -> bool:
    """Whether the body is compressed or the answer may have to be."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" or (name == b"accept-encoding" and value.strip().lower() in _PACKED):
            return True
    return False


def _finish(
    name: str, method: MethodInfo, request: InferRequest, answer: Answer, result: list[Outcome] | InflightError
) -> None:
    try:
        if isinstance(result, InflightError):
            raise result
        parts, raw = encode_response(name, method.version, request, from_outcomes(method, result, request.outputs))
    except InflightError as error:
        _answer_error(answer, error)
    except Exception as error:  # as in OpenInferenceRest.__call__
        _answer_error(answer, _internal(name, error))
    else:
        answer(200, _headers(parts, raw), parts[0] if len(parts) == 1 else b"".join(parts))  # type: ignore[arg-type]


def _refusal(error: InflightError) -> Refusal:
    return Refusal(error.http_status, [JSON, *error_headers(error)], orjson.dumps({"error": str(error)}))


def _answer_error(answer: Answer, error: InflightError) -> None:
    answer(error.http_status, [JSON, *error_headers(error)], orjson.dumps({"error": str(error)}))


def _internal(what: str, error: Exception) -> InflightError:
    _logger.error("an error nobody handled, %s", what, exc_info=error)
    return InflightError("internal server error, the server's log has the details")


def _headers(parts: Sequence[Body], raw: bool) -> list[Header]:
    if raw:
        return [_RAW, (_HEADER_LENGTH, b"%d" % len(parts[0]))]
    return [JSON]


async def _send(scope: Scope, send: Send, parts: Sequence[Body], raw: bool) -> None:
    """The answer to an inference; large parts leave as the views they are."""
    headers = _headers(parts, raw)
    encoding = accepted_encoding(scope)
    if encoding is not None:
        headers.append((b"content-encoding", encoding.encode()))
        parts = [await pack(parts, encoding)]
    size = sum(map(len, parts))
    if len(parts) > 1 and size <= _JOINED:
        parts = [b"".join(parts)]
    headers.append((b"content-length", b"%d" % size))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})


def _json_length(scope: Scope) -> int | None:
    value = header(scope, _HEADER_LENGTH)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be the bytes of the JSON part, not {value.decode('latin-1')!r}"
        )
    return int(value)


def _no_such_path(scope: Scope) -> NoSuchRoute:
    shown: Any = scope["path"]
    return NoSuchRoute(
        f"there is no {shown} here, use /v2, /v2/health/live, /v2/health/ready, /v2/repository/index, "
        "/v2/models/<model>[/versions/<version>] and below it /ready, /infer, /generate or /generate_stream"
    )
