"""A gRPC server on a thread of its own with a fake backend behind it, for the tests of the gRPC door."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import uvloop

from inflight.config import ListenConfig
from inflight.contract import MethodInfo, Outcome, Row, ServableStatus, TensorSpec
from inflight.errors import InflightError, ModelError, NotFound
from inflight.frontends import grpc_app
from inflight.wire import GrpcApp
from inflight.wire.listen import listen_grpc

MIB = 1 << 20
ENGINES = tuple(
    engine
    for engine, module in (("nghttp2", "inflight.wire._http2"), ("grpcio", "grpc"))
    if importlib.util.find_spec(module)
)
"""Those that can serve here."""
Function = Callable[[Row], "Row | Awaitable[Row]"]


def _method(servable: str, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> MethodInfo:
    return MethodInfo(servable, 2, name, tuple(inputs), tuple(outputs))


def _specs(*names: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, shape) for name in names]


def _fail(row: Row) -> Row:
    if np.any(np.asarray(row[0]) < 0):
        raise ModelError(f"negative input {np.asarray(row[0]).ravel()[0]}")
    return row


async def _slow(row: Row) -> Row:
    await asyncio.sleep(float(np.asarray(row[0]).ravel()[0]))
    return row


_FLOATS = {"dtype": "float32", "shape": (2, 2)}
METHODS: dict[tuple[str, str], tuple[MethodInfo, Function]] = {
    (info.servable, info.name): (info, function)
    for info, function in (
        (
            _method("add", "add_common", _specs("x1", "x2", **_FLOATS), _specs("y", **_FLOATS)),
            lambda row: [np.asarray(row[0]) + np.asarray(row[1])],
        ),
        (_method("multi", "echo", _specs("x"), _specs("y")), lambda row: row),
        (_method("multi", "fail", _specs("x"), _specs("y")), _fail),
        (_method("multi", "slow", _specs("x"), _specs("y")), _slow),
        (_method("multi", "both", _specs("x"), _specs("y", "n")), lambda row: [row[0], np.array(7)]),
        (_method("multi.sub", "text", _specs("x", dtype="str"), _specs("y", dtype="str")), lambda row: row),
        (_method("multi.sub", "predict", _specs("x"), _specs("y")), lambda row: row),
    )
}


@dataclass
class FakeBackend:
    """Runs the functions above on the event loop; counts what begins, ends and is cancelled."""

    generators: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    unloaded: ClassVar[tuple[str, ...]] = ()

    live: bool = True
    ready: bool = True
    refusal: InflightError | None = None
    timeouts: list[float | None] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        if all(name != servable for name, _ in METHODS) or version not in (0, 2):
            raise NotFound(f"servable: {servable}, version: {version}, servable is not available")
        if (servable, method) not in METHODS:
            raise NotFound(f"servable: {servable}, method: {method}, method is not available")
        return METHODS[servable, method][0]

    async def predict(self, method: MethodInfo, rows: Sequence[Row], *, timeout: float | None = None) -> list[Outcome]:
        assert rows
        self.timeouts.append(timeout)
        if self.refusal is not None:
            raise self.refusal
        self.running += 1
        try:
            return [await self._one(method, row) for row in rows]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Any], None],
        *,
        timeout: float | None = None,
        say: Any = None,
    ) -> Callable[[], object]:
        """As `Backend.submit` says."""
        task = asyncio.get_running_loop().create_task(self.predict(method, rows, timeout=timeout))

        def finished(task: asyncio.Task[list[Outcome]]) -> None:
            if not task.cancelled():
                done(task.exception() or task.result())

        task.add_done_callback(finished)
        return task.cancel

    async def _one(self, method: MethodInfo, row: Row) -> Outcome:
        try:
            result = METHODS[method.servable, method.name][1](row)
            return await result if isinstance(result, Awaitable) else result
        except InflightError as error:
            return error

    def servables(self) -> Sequence[ServableStatus]:
        names = dict.fromkeys(name for name, _ in METHODS)
        return [
            ServableStatus(
                name, 2, tuple(info for info, _ in METHODS.values() if info.servable == name), self.ready, 1, 1
            )
            for name in names
        ]


@contextmanager
def serving(app: GrpcApp, engine: str, address: str = "127.0.0.1:0", *, grace: float = 1.0) -> Iterator[str]:
    """Serves an application; gives the address to reach it by."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Awaitable[object]) -> object:
        async def run() -> object:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), loop).result(20)

    listener = call(listen_grpc(app, ListenConfig(address), engine=engine))
    try:
        yield listener.address  # type: ignore[attr-defined]
    finally:
        call(listener.close(grace))  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def served(backend: FakeBackend, engine: str = "grpcio", *, limit: int = 100 * MIB) -> Iterator[str]:
    """Serves the whole gRPC door over a fake backend."""
    with serving(grpc_app(backend, max_message_bytes=limit), engine) as where:
        yield where


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
