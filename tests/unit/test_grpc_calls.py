"""The gRPC application over real sockets, with grpcio as the client: calls, streams, deadlines, sizes, connections."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from inflight.frontends.grpc import GrpcApp, StreamRpc, UnaryRpc
from inflight.frontends.grpc import protocol as connection
from inflight.proto.health_pb2 import HealthCheckRequest as Text
from tests.grpc_server import MIB, eventually, serving
from tests.raw_http2 import RawClient

LIMIT = 40 * MIB
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Service:
    """Handlers that echo their text, and what became of them."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.yielded = 0
        self.timeouts: list[float | None] = []

    async def echo(self, request: Text, timeout: float | None) -> Text:
        self.timeouts.append(timeout)
        return request

    async def sleep(self, request: Text, timeout: float | None) -> Text:
        self.begun += 1
        try:
            await asyncio.sleep(float(request.service))
        finally:
            self.ended += 1
        return request

    async def crash(self, request: Text, timeout: float | None) -> Text:
        raise ZeroDivisionError(request.service)

    async def large(self, request: Text, timeout: float | None) -> Text:
        return Text(service="x" * int(request.service))

    async def count(self, request: Text, timeout: float | None) -> AsyncIterator[Text]:
        self.begun += 1
        try:
            for number in range(int(request.service)):
                yield Text(service=f"{number}" + "x" * 1000)
                self.yielded += 1
                await asyncio.sleep(0)
        finally:
            self.ended += 1

    async def chat(self, requests: AsyncIterator[Text], timeout: float | None) -> AsyncIterator[Text]:
        self.begun += 1
        try:
            async for request in requests:
                yield request
        finally:
            self.ended += 1

    def app(self) -> GrpcApp:
        unary = {name: UnaryRpc(Text.FromString, getattr(self, name)) for name in ("echo", "sleep", "crash", "large")}
        streams = {
            "count": StreamRpc(Text.FromString, handler=self.count),
            "chat": StreamRpc(Text.FromString, duplex=self.chat),
        }
        rpcs = {f"/test.Service/{name}": rpc for name, rpc in {**unary, **streams}.items()}
        return GrpcApp(rpcs, max_message_bytes=LIMIT)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service, engine: str) -> Iterator[str]:
    with serving(service.app(), engine) as where:
        yield where


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, options=UNLIMITED) as made:
        yield made


def unary(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(f"/test.Service/{name}", Text.SerializeToString, Text.FromString)


def chat(channel: grpc.Channel) -> grpc.StreamStreamMultiCallable:
    return channel.stream_stream("/test.Service/chat", Text.SerializeToString, Text.FromString)


def test_unary(channel: grpc.Channel) -> None:
    assert unary(channel, "echo")(Text(service="hé")).service == "hé"
    assert unary(channel, "echo")(Text()).service == ""  # an empty message


@pytest.mark.parametrize("size", [65_530, 1_000_000, 30_000_000])
def test_large_messages_both_ways(channel: grpc.Channel, size: int) -> None:
    text = "y" * size
    assert unary(channel, "echo")(Text(service=text), timeout=20).service == text


def test_limits_of_both_directions(channel: grpc.Channel, address: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "echo")(Text(service="y" * (LIMIT + 1)), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"Received message larger than max ({LIMIT + 6} vs. {LIMIT})" in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "large")(Text(service=str(LIMIT)), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "Sent message larger than max" in caught.value.details()
    assert unary(channel, "echo")(Text(service="on")).service == "on"
    with grpc.insecure_channel(address) as narrow, pytest.raises(grpc.RpcError) as caught:  # its own 4 MiB
        unary(narrow, "large")(Text(service=str(5 * MIB)), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_refused_message_is_not_buffered(address: str) -> None:
    with RawClient(address) as client:
        stream = client.post("/test.Service/echo")
        client.send(stream, struct.pack(">BI", 0, LIMIT + 1))  # and never the rest
        assert client.trailers(stream)[b"grpc-status"] == b"8"


def test_requests_are_not_held_back_by_small_windows(address: str) -> None:
    """On a link of 50 ms the engine's 64 KiB would be 1 MB/s."""
    with RawClient(address) as client:
        client.trailers(client.post("/test.Service/echo", Text()))  # the server's settings have come
        message = Text(service="x" * (connection.STREAM_WINDOW - 1000)).SerializeToString()
        stream = client.post("/test.Service/echo")
        assert client.windows(stream)[0] == connection.STREAM_WINDOW
        assert client.windows(stream)[1] > connection.CONNECTION_WINDOW - 100
        for _ in range(2):  # the whole request goes out before anything is read
            client.send(stream, struct.pack(">BI", 0, len(message)) + message, end=True)
            assert client.trailers(stream)[b"grpc-status"] == b"0"
            stream = client.post("/test.Service/echo")


@pytest.mark.parametrize("method", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(channel: grpc.Channel, method: grpc.Compression) -> None:
    for size in (10, 2_000_000):
        text = "z" * size
        assert unary(channel, "echo")(Text(service=text), compression=method, timeout=20).service == text


def test_deadline(service: Service, channel: grpc.Channel, address: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "sleep")(Text(service="30"), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: service.ended == 1)
    with RawClient(address) as client:  # a client that leaves the clock to the server
        stream = client.post("/test.Service/sleep", Text(service="30"), timeout=b"50m")
        assert client.trailers(stream)[b"grpc-status"] == b"4"
    assert service.ended == 2


def test_handlers_know_the_timeout(service: Service, channel: grpc.Channel) -> None:
    unary(channel, "echo")(Text(), timeout=7)
    unary(channel, "echo")(Text())
    first, second = service.timeouts
    assert first is not None
    assert 6 < first <= 7
    assert second is None


@pytest.mark.parametrize("name", ["sleep", "count", "chat"])
def test_cancelling_ends_the_handler(service: Service, channel: grpc.Channel, name: str) -> None:
    if name == "sleep":
        call = unary(channel, name).future(Text(service="30"))
    elif name == "count":
        count = channel.unary_stream("/test.Service/count", Text.SerializeToString, Text.FromString)
        call = count(Text(service="100000000"))
        next(call)
    else:
        hold = threading.Event()
        call = chat(channel)(Text(service="x") if hold.wait(30) else Text() for _ in range(1))
    assert eventually(lambda: service.begun == 1)
    call.cancel()
    assert eventually(lambda: service.ended == 1)
    if name == "chat":
        hold.set()


def test_a_lost_connection_ends_the_handler(service: Service, address: str) -> None:
    client = RawClient(address)
    client.post("/test.Service/sleep", Text(service="30"))
    assert eventually(lambda: service.begun == 1)
    client.close()
    assert eventually(lambda: service.ended == 1)


def test_server_stream(channel: grpc.Channel) -> None:
    count = channel.unary_stream("/test.Service/count", Text.SerializeToString, Text.FromString)
    assert [int(each.service.rstrip("x")) for each in count(Text(service="300"), timeout=10)] == list(range(300))


def test_bidirectional_stream(channel: grpc.Channel) -> None:
    texts = ["a", "b" * 100_000, "", "c" * 3_000_000, "d"]
    assert [each.service for each in chat(channel)((Text(service=text) for text in texts), timeout=10)] == texts


def test_a_stream_waits_for_its_reader(service: Service, channel: grpc.Channel) -> None:
    count = channel.unary_stream("/test.Service/count", Text.SerializeToString, Text.FromString)
    call = count(Text(service="200000"))  # 200 MB
    next(call)
    seen = -1
    while seen != service.yielded:  # until it stands still
        seen = service.yielded
        threading.Event().wait(0.3)
    assert seen < 50_000
    assert unary(channel, "echo")(Text(service="beside it"), timeout=5).service == "beside it"
    for _ in range(20_000):
        next(call)
    assert eventually(lambda: service.yielded > seen)
    call.cancel()


def test_errors_keep_the_server(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "crash")(Text(service="secret"))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "secret" in caplog.text
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "nothing")(Text())
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "/test.Service/nothing" in caught.value.details()
    echo = channel.unary_unary("/test.Service/echo")
    with pytest.raises(grpc.RpcError) as caught:
        echo(b"\xff\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert unary(channel, "echo")(Text(service="on")).service == "on"


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


def test_many_calls_on_one_channel_outlive_its_connections(address: str) -> None:
    """The HTTP/2 engine cuts a connection at 4,096 streams; no call may be lost to that."""

    async def run() -> int:
        async with grpc.aio.insecure_channel(address) as made:
            sleep = made.unary_unary("/test.Service/sleep", Text.SerializeToString, Text.FromString)
            request = Text(service="0.001")

            async def caller() -> int:
                for _ in range(60):
                    await sleep(request)
                return 60

            return sum(await asyncio.gather(*(caller() for _ in range(80))))

    assert asyncio.run(run()) == 4800 > connection.MAX_STREAMS


def test_many_cancelled_calls_do_not_harm_their_neighbour(service: Service, channel: grpc.Channel) -> None:
    """The HTTP/2 engine cuts a connection at 256 resets; a call in flight must survive them."""
    neighbour = unary(channel, "sleep").future(Text(service="2"))
    assert eventually(lambda: service.begun == 1)
    for turn in range(6):
        calls = [unary(channel, "sleep").future(Text(service="30")) for _ in range(60)]
        assert eventually(lambda turn=turn: service.begun == 1 + 60 * (turn + 1))
        for call in calls:
            call.cancel()
        assert eventually(lambda: service.begun - service.ended == 1)
    assert not neighbour.done()
    assert neighbour.result(timeout=5).service == "2"


def test_more_calls_at_once_than_streams(channel: grpc.Channel) -> None:
    calls = [unary(channel, "sleep").future(Text(service="0.05")) for _ in range(400)]
    assert all(call.result(timeout=10).service == "0.05" for call in calls)


def test_a_hundred_channels(address: str) -> None:
    channels = [grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(100)]
    calls = [unary(each, "sleep").future(Text(service="0.05")) for each in channels]
    assert all(call.result(timeout=10).service == "0.05" for call in calls)
    for each in channels:
        each.close()


def test_keepalive_pings(address: str) -> None:
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(address, options=options) as made:
        assert unary(made, "sleep")(Text(service="1"), timeout=5).service == "1"


def test_unix_socket(service: Service, engine: str, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/s"
    with serving(service.app(), engine, where), grpc.insecure_channel(where) as made:
        assert unary(made, "echo")(Text(service="x" * 200_000)).service == "x" * 200_000


def test_calls_in_flight_outlive_the_stop(service: Service, engine: str) -> None:
    with serving(service.app(), engine) as where:
        made = grpc.insecure_channel(where)
        call = unary(made, "sleep").future(Text(service="0.3"))
        assert eventually(lambda: service.begun == 1)
    assert call.result(timeout=1).service == "0.3"
    made.close()


def test_a_client_that_reads_nothing_is_not_read_from(address: str) -> None:
    with RawClient(address) as client:
        client.socket.settimeout(1.0)
        pings = b"\0\0\x08\x06\0\0\0\0\0aaaaaaaa" * 4096
        with pytest.raises(TimeoutError):
            client.socket.sendall(pings * 2000)  # 140 MB of answers otherwise
