"""Connections under nghttp2: windows, what is not gRPC, clients that cancel much."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from inflight.wire import GrpcApp, UnaryRpc
from tests.grpc_server import MIB, eventually, serving
from tests.grpc_service import Service, Text, unary
from tests.raw_http2 import RawClient

engine = pytest.importorskip("inflight.wire.grpc.nghttp2_engine", reason="the package was built without nghttp2")

MANY, PATH = 1_000_000, "/test.Service/echo"


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with serving(service.app(), "nghttp2") as where:
        yield where


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as made:
        yield made


def test_requests_are_not_held_back_by_small_windows(address: str) -> None:
    """On a link of 50 ms HTTP/2's first windows, 64 KiB, would be 1 MB/s."""
    with RawClient(address) as client:
        client.trailers(client.post("/test.Service/echo", Text()))  # the server's settings have come
        message = Text(service="x" * (engine.STREAM_WINDOW - 1000)).SerializeToString()
        stream = client.post("/test.Service/echo")
        assert client.windows(stream)[0] == engine.STREAM_WINDOW
        assert client.windows(stream)[1] > engine.CONNECTION_WINDOW - 100
        for _ in range(2):  # the whole request goes out before anything is read
            client.send(stream, struct.pack(">BI", 0, len(message)) + message, end=True)
            assert client.trailers(stream)[b"grpc-status"] == b"0"
            stream = client.post("/test.Service/echo")


def test_what_is_not_grpc(address: str) -> None:
    with RawClient(address) as client:
        assert client.status(client.post("/test.Service/echo", Text(), content_type=b"application/json")) == 415
        assert client.status(client.post("/test.Service/echo", Text(), content_type=b"application/grpc-web")) == 415
        assert client.status(client.post("/test.Service/echo", Text(), method=b"GET")) == 405
        stream = client.post("/test.Service/echo", Text(), encoding=b"snappy")
        assert client.trailers(stream)[b"grpc-status"] == b"12"
        assert dict(client.heads[stream])[b"grpc-accept-encoding"] == b"identity,deflate,gzip"
        stream = client.post("/test.Service/echo", Text(), te=False, content_type=b"application/grpc+proto")
        assert client.trailers(stream)[b"grpc-status"] == b"0"
        stream = client.post("/test.Service/echo", Text(), timeout=b"soon")
        assert client.trailers(stream)[b"grpc-status"] == b"13"


def test_many_cancelled_calls_do_not_harm_their_neighbour(service: Service, channel: grpc.Channel) -> None:
    """What keeps floods of resets out must not cut a connection whose client gives calls up."""
    neighbour = unary(channel, "sleep").future(Text(service="2"))
    assert eventually(lambda: service.begun == 1)
    for turn in range(6):
        calls = [unary(channel, "sleep").future(Text(service="30")) for _ in range(60)]
        assert eventually(lambda turn=turn: service.begun == 1 + 60 * (turn + 1))  # type: ignore[misc]
        for call in calls:
            call.cancel()
        assert eventually(lambda: service.begun - service.ended == 1)
    assert not neighbour.done()
    assert neighbour.result(timeout=5).service == "2"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)")
def test_a_million_calls_over_one_connection(tmp_path: Path) -> None:
    """Each is answered, and what the server keeps does not grow with their number.

    16 bytes kept of each call would be the bound. The size is looked at while the connection is open, since what
    belongs to a connection goes with it. h2load opens no second one, and reads no trailers: an answer that is an error
    has no data.
    """
    seen = 0

    async def echo(request: Text, timeout: float | None) -> Text:
        nonlocal seen
        seen += 1
        return request

    body = Text(service="x" * 30).SerializeToString()
    sent = tmp_path / "frame"
    sent.write_bytes(struct.pack(">BI", 0, len(body)) + body)
    app = GrpcApp({PATH: UnaryRpc(Text.FromString, echo)}, max_message_bytes=MIB)
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    load = ["h2load", "-t1", "-c1", "-m16", "-d", str(sent), *headers]
    with serving(app, "auto") as where:
        url = f"http://{where}{PATH}"
        subprocess.run([*load, "-n20000", url], check=True, capture_output=True, timeout=60)
        assert seen == 20_000
        server = psutil.Process()
        before = largest = server.memory_info().rss
        with subprocess.Popen([*load, f"-n{MANY}", url], stdout=subprocess.PIPE, text=True) as client:
            while client.poll() is None:
                largest = max(largest, server.memory_info().rss)
                time.sleep(0.2)
            assert client.stdout is not None
            said = client.stdout.read()
    assert f"{MANY} done, {MANY} succeeded, 0 failed, 0 errored, 0 timeout" in said
    data = re.search(r"\((\d+)\) data", said)
    assert data is not None
    assert int(data[1]) == MANY * sent.stat().st_size
    assert seen == 20_000 + MANY
    assert largest - before < 16 * MIB
