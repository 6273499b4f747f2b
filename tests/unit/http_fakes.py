"""A backend that echoes, and a listener on a loop of its own thread, for tests with real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
import uvloop

from inflight.config import ListenConfig, RestConfig
from inflight.contract import MethodInfo, Outcome, Row, ServableStatus, TensorSpec
from inflight.errors import InflightError, ModelError, NotFound
from inflight.frontends import Door, Keys
from inflight.frontends.app import http_app
from inflight.metrics import Metrics
from inflight.wire.connections import HttpLimits
from inflight.wire.listen import Listener, listen_http

MB = 1 << 20
T = TypeVar("T")
Done = Callable[["list[Outcome] | InflightError"], None]


def method(servable: str, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> MethodInfo:
    return MethodInfo(servable, 1, name, tuple(inputs), tuple(TensorSpec(output) for output in outputs))


ECHO = method("echo", "predict", [TensorSpec("x")], ["y"])
PAIR = method("my model", "predict", [TensorSpec("a", "float32", (2,)), TensorSpec("t", "str")], ["a2", "t2"])
SLOW = method("slow", "predict", [TensorSpec("x")], ["y"])
FAIL = method("fail", "predict", [TensorSpec("x")], ["y"])


class ByTask:
    """`submit` over a fake's own `predict`."""

    predict: Callable[..., Awaitable[Sequence[Outcome]]]

    def submit(
        self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: Any = None
    ) -> Callable[[], None]:
        async def run() -> None:
            try:
                result: Sequence[Outcome] | InflightError = await self.predict(method, rows, timeout=timeout)
            except Exception as error:
                result = error if isinstance(error, InflightError) else InflightError(str(error))
            done(result)

        task = asyncio.get_running_loop().create_task(run())

        def cancel() -> None:
            task.cancel()  # which leaves one that is done alone

        return cancel


class EchoBackend(ByTask):
    """Answers its inputs; `slow` takes until `release` is called, `fail` fails."""

    generators: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    unloaded: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.live = True
        self.ready = True
        self.seen: list[Sequence[Row]] = []
        self.timeouts: list[float | None] = []
        self.cancelled = 0
        self.started = 0
        self.gate = asyncio.Event()

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        for known in (ECHO, PAIR, SLOW, FAIL):
            if (known.servable, known.name) == (servable, method) and version in (0, 1):
                return known
        raise NotFound(f"Serving Error: servable {servable} is not available")

    async def predict(self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None) -> list[Outcome]:
        self.seen.append(rows)
        self.timeouts.append(timeout)
        self.started += 1
        if method is SLOW:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if method is FAIL:
            error: InflightError = ModelError("no luck")
            return [error for _ in rows]
        if method is PAIR:
            return [[np.asarray(a) * 2, f"{t!s}!"] for a, t in rows]
        return list(rows)

    def servables(self) -> Sequence[ServableStatus]:
        return [ServableStatus(m.servable, 1, (m,), self.ready, 1, int(self.ready)) for m in (ECHO, PAIR, SLOW, FAIL)]


class Loop:
    """An event loop in a thread; `call` runs a coroutine there and waits for it."""

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop) -> None:
        self.loop = factory()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.thread_id = self._thread.ident or 0

    def call(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)

    def stop(self) -> None:
        self.call(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Served:
    """A listener with the echo backend behind the whole HTTP application."""

    def __init__(self, loop: Loop, listener: Listener, backend: EchoBackend, metrics: Metrics) -> None:
        self.loop = loop
        self.listener = listener
        self.backend = backend
        self.metrics = metrics
        self.address = listener.address
        self.host, _, port = listener.address.rpartition(":")
        self.port = int(port)

    def close(self, grace: float = 0.0) -> None:
        self.loop.call(self.listener.close(grace))

    def release(self) -> None:
        self.loop.loop.call_soon_threadsafe(self.backend.gate.set)


@contextmanager
def serve(
    *,
    config: ListenConfig = ListenConfig("127.0.0.1:0"),
    limits: HttpLimits | None = None,
    rest: RestConfig = RestConfig(),
    app: Any = None,
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    api_key: str | None = None,
    protocols: Sequence[type[Door]] = (),
) -> Iterator[Served]:
    """Everything on a free port, gone afterwards: no task of it may be left."""
    loop = Loop(factory)
    metrics = Metrics()
    try:
        backend = loop.call(_make_backend())
        limit = limits.max_body_bytes if limits else config.max_message_mb << 20
        keys = Keys(api_key, None, metrics.keys) if api_key is not None else None
        made = app or http_app(
            backend, max_body_bytes=limit, rest=rest, metrics=metrics, keys=keys, protocols=protocols
        )
        listener = loop.call(listen_http(made, config, limits=limits))
        try:
            yield Served(loop, listener, backend, metrics)
        finally:
            loop.call(listener.close(0.0))
            assert loop.call(_tasks()) == 1, "a task is left behind"
    finally:
        loop.stop()


async def _make_backend() -> EchoBackend:
    return EchoBackend()


async def _tasks() -> int:
    await asyncio.sleep(0)
    return len(asyncio.all_tasks())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Sends the body back, as the object that it came in."""
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body = bytes(body) + bytes(message["body"])
    kind = b"%s %d" % (type(body).__name__.encode(), len(body))
    headers = [(b"content-length", b"%d" % len(body)), (b"x-body", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def limits(**changes: Any) -> HttpLimits:
    return HttpLimits(**({"max_body_bytes": 64 * MB} | changes))


def read_all(raw: socket.socket) -> bytes:
    answer = bytearray()
    try:
        while chunk := raw.recv(65536):
            answer += chunk
    except (TimeoutError, ConnectionResetError):
        pass
    return bytes(answer)


def read_answer(reader: Any) -> bytes:
    assert reader.readline() == b"HTTP/1.1 200 OK\r\n"
    length = 0
    while (line := reader.readline()) != b"\r\n":
        if line.startswith(b"content-length:"):
            length = int(line.split()[1])
    data: bytes = reader.read(length)
    return data


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
