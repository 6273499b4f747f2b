"""Hostile bytes: every connection is answered or closed within a second, and the server lives on."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import grpc
import pytest

from inflight.frontends.mindspore.grpc import PATH
from inflight.proto import ms_service_pb2 as pb
from tests.grpc_server import FakeBackend, served
from tests.raw_http2 import RawClient

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
PATHS = (PATH, "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer")
LIMIT = 1 << 20
RESET: tuple[str, dict[bytes, bytes]] = ("grpcio", {})
"""What the C core cannot read as messages, it may answer with a reset."""


@pytest.fixture(scope="module")
def address(engine: str) -> Iterator[str]:
    with served(FakeBackend(), engine, limit=LIMIT) as where:
        yield where


@pytest.fixture(autouse=True)
def lives_on(address: str, engine: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    names = ("inflight", "asyncio") if engine == "nghttp2" else ("inflight",)  # grpcio tells how its server ended
    records = [record for record in caplog.get_records("call") if record.name.startswith(names)]
    assert not [record for record in records if record.exc_info]  # nothing nobody handled
    with grpc.insecure_channel(address) as channel:
        predict = channel.unary_unary(PATH, pb.PredictRequest.SerializeToString, pb.PredictReply.FromString)
        assert predict(pb.PredictRequest(), timeout=5, wait_for_ready=True).error_msg[0].error_code == 2


def framed(message: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(message)) + message


def bodies(chance: random.Random, count: int) -> Iterator[bytes]:
    """Random bytes, and valid requests with a few bytes changed."""
    valid = pb.PredictRequest()
    valid.servable_spec.name, valid.servable_spec.method_name = "add", "add_common"
    for name in ("x1", "x2"):
        one = valid.instances.add().items[name]
        one.dtype = pb.MS_FLOAT32
        one.shape.dims.extend([2, 2])
        one.data = bytes(16)
    for index in range(count):
        if index % 3 == 0:
            yield chance.randbytes(chance.randrange(80))
        elif index % 3 == 1:
            yield framed(chance.randbytes(chance.randrange(200)), chance.choice((0, 0, 1)))
        else:
            message = bytearray(valid.SerializeToString())
            for _ in range(chance.randrange(1, 5)):
                message[chance.randrange(len(message))] = chance.randrange(256)
            yield framed(bytes(message))


@pytest.mark.parametrize("path", PATHS)
def test_random_bodies_are_answered(address: str, path: str, engine: str) -> None:
    chance = random.Random(7)
    with RawClient(address, seconds=1.0) as client:
        for body in bodies(chance, 300):
            encoding = chance.choice((None, None, b"gzip", b"deflate"))
            stream = client.post(path, encoding=encoding)
            client.send(stream, body, end=True)
            answer = client.trailers(stream)
            assert answer.get(b"grpc-status") in (b"0", b"3", b"5", b"8", b"12", b"13") or (engine, answer) == RESET


def ends(address: str, data: bytes, until: bytes = b"", *, half_close: bool = False) -> None:
    """Sends bytes; within a second the server must close the connection, or send what `until` says."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(1.0)
        got = b""
        try:
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            while (more := client.recv(65536)) and not (until and until in got + more):
                got += more
        except ConnectionError:  # a reset is an end too
            pass


def test_random_bytes_close_the_connection(address: str) -> None:
    chance = random.Random(8)
    for _ in range(100):
        ends(address, b"\x80" + chance.randbytes(chance.randrange(300)))
    ends(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    ends(address, PREFACE + b"\0\0\x08\x06\0\0\0\0\0" + bytes(8))  # not SETTINGS first
    for data in (b"", PREFACE[:10], PREFACE + SETTINGS + b"\0\0\xff\x01\0"):
        ends(address, data, half_close=True)


def test_random_frames_are_answered_or_close(address: str) -> None:
    chance = random.Random(9)
    answered = b"\0\0\x08\x06\x01\0\0\0\0fuzzfuzz"
    ping = b"\0\0\x08\x06\0\0\0\0\0fuzzfuzz"
    for _ in range(300):
        frames = [SETTINGS]
        for _ in range(chance.randrange(1, 8)):
            payload = chance.randbytes(chance.choice((0, 1, 4, 5, 8, 40)))
            stream = chance.choice((0, 1, 1, 3, 2, 2**31 - 1))
            header = struct.pack(">I", len(payload))[1:] + bytes((chance.randrange(12), chance.randrange(256)))
            frames.append(header + struct.pack(">I", stream) + payload)
        ends(address, PREFACE + b"".join(frames) + ping, answered)
    ends(address, PREFACE + SETTINGS + ping, answered)


def test_half_requests_whose_client_leaves(address: str) -> None:
    for _ in range(20):
        client = RawClient(address)
        stream = client.post(PATH)
        client.send(stream, struct.pack(">BI", 0, 1000) + bytes(10))
        client.close()


@pytest.mark.parametrize("path", [b"/\xff\xfe", b"/%FF%00", b"/" + b"a" * 20_000, b"*"])
def test_odd_paths(address: str, path: bytes, engine: str) -> None:
    with RawClient(address, seconds=1.0) as client:
        stream = client.post(path, pb.PredictRequest())
        answer = client.trailers(stream).get(b"grpc-status", b"12")
        assert answer == b"12" or (engine, answer) == ("grpcio", b"1")  # its server begins again
