"""Which engine serves the gRPC door, what each brings into the process, and what grpcio must not do there."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from inflight.config import ListenConfig
from inflight.errors import ConfigError, StartError
from inflight.wire import GrpcApp
from inflight.wire.listen import listen_grpc
from tests.grpc_server import ENGINES, eventually, serving
from tests.grpc_service import Service, Text, unary
from tests.raw_http2 import RawClient

FREE = ListenConfig("127.0.0.1:0")
NOTHING = GrpcApp({}, max_message_bytes=1)
INFLIGHT = Path(__file__).resolve().parents[2] / "inflight"


def kind_of(engine: str) -> str:
    """The class of the listener that an engine gives."""

    async def run() -> str:
        listener = await listen_grpc(NOTHING, FREE, engine=engine)
        await listener.close(0)
        return type(listener).__name__

    return asyncio.run(run())


def test_auto_takes_nghttp2_where_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    if "nghttp2" in ENGINES:
        assert kind_of("auto") == kind_of("nghttp2") == "SocketListener"
    monkeypatch.setitem(sys.modules, "inflight.wire.grpc.nghttp2_engine", None)  # as where it was not
    assert kind_of("auto") == kind_of("grpcio") == "GrpcioListener"
    with pytest.raises(StartError, match=r"nghttp2 cannot be imported.*libnghttp2-dev.* or use the engine grpcio"):
        kind_of("nghttp2")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="'c' is not known, use one of: auto, nghttp2, grpcio"):
        kind_of("c")


FOREIGN = {"nghttp2": "grpc", "grpcio": "inflight.wire._http2"}


@pytest.mark.parametrize("own", ENGINES)
def test_an_engine_does_not_bring_in_the_other(own: str) -> None:
    code = (
        "import asyncio, sys, inflight.server\n"
        "from inflight.config import ListenConfig\n"
        "from inflight.wire import GrpcApp, listen_grpc\n"
        "async def run():\n"
        f"    app = GrpcApp({{}}, max_message_bytes=1)\n"
        f"    await (await listen_grpc(app, ListenConfig('127.0.0.1:0'), engine={own!r})).close(0)\n"
        "asyncio.run(run())\n"
        f"print({FOREIGN[own]!r} in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_engines_are_imported_in_one_place() -> None:
    def importers(name: str) -> set[str]:
        words = (f"import {name}\n", f"import {name}.", f"from {name} ", f"from {name}.")
        return {
            str(path.relative_to(INFLIGHT))
            for room in ("wire", "frontends")
            for path in (INFLIGHT / room).rglob("*.py")
            if any(line.strip(" ").startswith(words) for line in path.read_text().splitlines(keepends=True))
        }

    assert importers("grpc") == {f"wire/grpc/{name}.py" for name in ("completions", "grpcio_calls", "grpcio_engine")}
    assert not importers("uvicorn")


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> Iterator[str]:
    where = "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"
    with serving(service.app(), "grpcio", where) as address:
        yield address


def echoes(address: str) -> bool:
    try:
        with RawClient(address) as client:
            stream = client.post("/test.Service/echo", Text(service="on"))
            return client.trailers(stream).get(b"grpc-status") == b"0"
    except (OSError, AssertionError):
        return False


def test_a_method_that_is_not_utf8_does_not_shut_the_door(
    service: Service, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """grpc.aio ends its server over it; the calls in flight must not notice."""
    caplog.set_level(logging.CRITICAL)
    for turn in range(1, 4):
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            running = unary(channel, "sleep").future(Text(service="0.5"))
            assert eventually(lambda turn=turn: service.begun == turn)  # type: ignore[misc]
            with RawClient(address) as hostile:
                assert hostile.trailers(hostile.post(b"/\xff", Text())).get(b"grpc-status") in (b"1", b"12")
            assert eventually(lambda: echoes(address), 2)
            assert running.result(timeout=5).service == "0.5"


def test_the_door_can_be_closed_while_it_opens_again(service: Service, tmp_path: Path) -> None:
    for _ in range(5):
        with serving(service.app(), "grpcio", f"unix:{tmp_path}/s") as address, RawClient(address) as hostile:
            hostile.post(b"/\xff", Text())
        assert list(tmp_path.iterdir()) == []
