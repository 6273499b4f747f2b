"""HTTP/2 clients that mean harm: memory stays bounded, and the others are served."""

from __future__ import annotations

import gc
import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import numpy as np
import psutil
import pytest

from inflight.frontends.mindspore.grpc import PATH
from inflight.proto import ms_service_pb2 as pb
from inflight.wire.grpc import grpcio_calls
from tests.grpc_server import MIB, FakeBackend, eventually, served
from tests.http2_frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
    head,
    text,
)

LIMIT = 4 * MIB
GROWTH = 96 * MIB
"""What a test may add to this process's memory: the flood itself would be more."""
SECONDS = 5.0


def call(name: str, value: np.ndarray) -> pb.PredictRequest:
    request = pb.PredictRequest()
    request.servable_spec.name, request.servable_spec.method_name = "multi", name
    tensor = request.instances.add().items["x"]
    tensor.dtype = pb.MS_FLOAT32
    tensor.shape.dims.extend(value.shape)
    tensor.data = value.astype(np.float32).tobytes()
    return request


def framed(message: pb.PredictRequest) -> bytes:
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def address(engine: str, backend: FakeBackend) -> Iterator[str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpcio_calls, "MAX_WAITING", 16 * MIB)
        if engine == "nghttp2":
            patch.setattr("inflight.wire.grpc.nghttp2_engine.MAX_REPLIES", 16 * MIB)
        with served(backend, engine, limit=LIMIT) as where:
            yield where
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def others(address: str) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    """What another client calls; its calls have to be answered."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        predict = channel.unary_unary(PATH, pb.PredictRequest.SerializeToString, pb.PredictReply.FromString)
        served_well(predict)
        yield predict
        served_well(predict)


@pytest.fixture(autouse=True)
def bounded(others: object, backend: FakeBackend) -> Iterator[None]:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    assert eventually(lambda: backend.running == 0)
    assert process.memory_info().rss - before < GROWTH


def served_well(predict: grpc.UnaryUnaryMultiCallable) -> None:
    reply = predict(call("echo", np.arange(3)), timeout=20, wait_for_ready=True)
    assert reply.instances[0].items["y"].data == np.arange(3, dtype=np.float32).tobytes()


def connected(address: str, *settings: tuple[int, int]) -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=SECONDS)
    made.sendall(PREFACE + frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *each) for each in settings)))
    return made


def flood(client: socket.socket, piece: bytes, count: int) -> int:
    """Sends a piece so often, and reads nothing; how often until the server cut the connection or stopped reading."""
    client.settimeout(0.5)
    for sent in range(count):
        try:
            client.sendall(piece)
        except OSError:  # a TimeoutError is one
            return sent
    return count


def test_rapid_reset(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """Calls that are cancelled at once, as fast as they can be sent (CVE-2023-44487)."""
    total, begin = 0, time.monotonic()
    while total < 20_000 and time.monotonic() - begin < 20:
        with connected(address) as client:
            client.settimeout(0.5)
            block = head(PATH)
            for first in range(1, 4000, 200):
                pieces = [
                    frame(HEADERS, END_HEADERS, stream, block) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
                    for stream in range(first, first + 200, 2)
                ]
                try:
                    client.sendall(b"".join(pieces))
                except OSError:
                    break
                total += len(pieces)
        served_well(others)
    assert total >= 20_000


def test_continuation_flood(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """A header block that never ends (CVE-2024-27316)."""
    piece = frame(CONTINUATION, 0, 1, b"\x00" + text(b"x-more") + text(b"y" * 16_000)) * 4
    with connected(address) as client:
        client.sendall(frame(HEADERS, 0, 1, head(PATH)))
        flood(client, piece, 2000)  # 128 MB; the core reads on, but keeps nothing of it
        served_well(others)
    with connected(address) as client:  # frames that hold nothing
        client.sendall(frame(HEADERS, 0, 1, head(PATH)))
        flood(client, frame(CONTINUATION, 0, 1) * 4096, 200)
        served_well(others)


def test_settings_flood(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """Each frame wants an acknowledgement, and none is read (CVE-2019-9515)."""
    piece = frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 65_535)) * 4096
    with connected(address) as client:
        assert flood(client, piece, 2000) < 2000  # 8 million
        served_well(others)


def test_header_bomb(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """A header of 4 kB in the table, named 16,000 times by one byte each: 64 MB out of 16 kB."""
    entry = b"\x40" + text(b"x-bomb") + text(b"b" * 4000)
    with connected(address) as client:
        for stream in range(1, 64, 2):
            try:
                client.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, head(PATH) + entry + b"\xbe" * 12_000))
            except OSError:
                break
        served_well(others)


def test_replies_that_nobody_takes(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """A client that opens no window calls for large replies: they may not pile up."""
    body = framed(call("echo", np.zeros(MIB - 1000)))
    pieces = [body[first : first + 16_384] for first in range(0, len(body), 16_384)]
    with connected(address, (INITIAL_WINDOW_SIZE, 0)) as client:  # 400 MB of replies
        client.settimeout(1.0)
        for stream in range(1, 200, 2):
            data = [frame(DATA, END_STREAM if piece is pieces[-1] else 0, stream, piece) for piece in pieces]
            try:
                client.sendall(frame(HEADERS, END_HEADERS, stream, head(PATH)) + b"".join(data))
            except OSError:  # it is not read from any more, which is well
                break
        served_well(others)


def test_half_open_connections(address: str, others: grpc.UnaryUnaryMultiCallable) -> None:
    """A thousand clients that begin and go no further: with nothing, half a preface, a call without its message."""
    call_alone = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, head(PATH))
    beginnings = [
        b"",
        PREFACE[:10],
        PREFACE + frame(SETTINGS, 0, 0),
        call_alone,
        call_alone + frame(DATA, 0, 1, b"\0\0\0\1\0abc"),
    ]
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for number in range(1000):
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
            client.sendall(beginnings[number % len(beginnings)])
            if number % 250 == 0:
                served_well(others)
        served_well(others)


RESET = b"\0\0\x04\x03\0"
"""The beginning of an RST_STREAM frame; the stream's number follows."""


def test_the_longest_idle_call_makes_room(
    address: str, engine: str, others: grpc.UnaryUnaryMultiCallable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls whose message does not come are given up for those that can be served."""
    if engine != "grpcio":
        pytest.skip("its connections bound their streams")
    monkeypatch.setattr(grpcio_calls, "MAX_CALLS", 20)
    with connected(address) as client:
        client.sendall(b"".join(frame(HEADERS, END_HEADERS, stream, head(PATH)) for stream in range(1, 101, 2)))
        got = b""
        while got.count(RESET) < 30:  # all fifty have come, the oldest were given up
            got += client.recv(65_536)
        assert RESET + b"\0\0\0\x01" in got
        for _ in range(30):
            served_well(others)
