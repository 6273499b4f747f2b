"""The gRPC application over real sockets, with grpcio as the client: calls, streams, deadlines, sizes, connections."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.grpc_server import MIB, eventually, serving
from tests.grpc_service import LIMIT, Service, Text, unary
from tests.raw_http2 import RawClient

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


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


def test_a_large_message_in_a_stream_is_refused(channel: grpc.Channel) -> None:
    replies = chat(channel)(iter([Text(service="a"), Text(service="y" * LIMIT)]), timeout=20)
    assert next(replies).service == "a"
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_request_without_a_message_is_answered(address: str) -> None:
    with RawClient(address) as client:
        for name in ("echo", "count"):
            stream = client.post(f"/test.Service/{name}")
            client.send(stream, b"", end=True)
            assert client.trailers(stream)[b"grpc-status"] == b"13"


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
    assert eventually(lambda: service.ended == 2)


def test_handlers_know_the_timeout(service: Service, channel: grpc.Channel) -> None:
    unary(channel, "echo")(Text(), timeout=7)
    unary(channel, "echo")(Text())
    first, second = service.timeouts
    assert first is not None
    assert 6 < first < 8  # gRPC rounds what it sends upwards
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


def test_a_stream_begins_before_its_first_reply(channel: grpc.Channel) -> None:
    hold = threading.Event()
    call = chat(channel)((Text() for _ in range(1) if hold.wait(10)), timeout=10)
    call.initial_metadata()
    hold.set()
    assert len(list(call)) == 1


def test_a_stream_waits_for_its_reader(service: Service, channel: grpc.Channel) -> None:
    count = channel.unary_stream("/test.Service/count", Text.SerializeToString, Text.FromString)
    call = count(Text(service="20000"))  # 200 MB
    next(call)
    seen = -1
    while seen != service.yielded:  # until it stands still
        seen = service.yielded
        threading.Event().wait(0.3)
    assert seen < 5_000
    assert unary(channel, "echo")(Text(service="beside it"), timeout=5).service == "beside it"
    for _ in range(3_000):
        next(call)
    assert eventually(lambda: service.yielded > seen)
    call.cancel()


@pytest.mark.parametrize("text", ["gone", "100% \n é", "模型" * 5000, "half a pair \ud83d."])
def test_statuses_of_handlers(channel: grpc.Channel, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "refuse")(Text(service=text.encode("utf-16", "surrogatepass").hex()))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    details = caught.value.details()
    assert len(details) >= min(len(text), 600)
    assert text.replace("\ud83d", "?").startswith(details)


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


def test_more_calls_at_once_than_streams(channel: grpc.Channel) -> None:
    calls = [unary(channel, "sleep").future(Text(service="0.05")) for _ in range(400)]
    assert all(call.result(timeout=10).service == "0.05" for call in calls)


def test_thousands_of_calls_on_one_channel(address: str) -> None:
    async def run() -> int:
        async with grpc.aio.insecure_channel(address) as made:
            sleep = made.unary_unary("/test.Service/sleep", Text.SerializeToString, Text.FromString)
            request = Text(service="0.001")

            async def caller() -> int:
                for _ in range(60):
                    await sleep(request)
                return 60

            return sum(await asyncio.gather(*(caller() for _ in range(80))))

    assert asyncio.run(run()) == 4800


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


def test_a_stream_that_waits_for_requests_does_not_hold_up_the_stop(service: Service, engine: str) -> None:
    hold = threading.Event()

    def requests() -> Iterator[Text]:
        yield Text()
        hold.wait(20)

    with serving(service.app(), engine, grace=10) as where:
        made = grpc.insecure_channel(where)
        replies = chat(made)(requests())
        next(replies)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    hold.set()
    made.close()


def test_calls_that_outlast_the_grace_are_cut(service: Service, engine: str) -> None:
    with serving(service.app(), engine, grace=0.2) as where:
        made = grpc.insecure_channel(where)
        calls = [unary(made, name).future(Text(service="30")) for name in ("sleep", "linger")]
        assert eventually(lambda: service.begun == 2)
        begin = time.monotonic()
    assert 0.2 < time.monotonic() - begin < 4
    assert service.ended == 2
    for call in calls:
        assert call.exception(timeout=1).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    made.close()


def test_a_client_that_reads_nothing_is_not_read_from(address: str) -> None:
    with RawClient(address) as client:
        client.socket.settimeout(1.0)
        pings = b"\0\0\x08\x06\0\0\0\0\0aaaaaaaa" * 4096
        with pytest.raises((TimeoutError, ConnectionError)):  # or it is cut
            client.socket.sendall(pings * 2000)  # 140 MB of answers otherwise
