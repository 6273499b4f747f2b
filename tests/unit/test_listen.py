"""Listeners: addresses, busy ports, unix sockets, stopping."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from inflight.config import ListenConfig
from inflight.errors import ConfigError, StartError
from inflight.log import LOGGER
from inflight.server import Server
from inflight.wire import GrpcApp
from inflight.wire.address import GRPC, RESTFUL, parse_address
from inflight.wire.listen import listen_grpc, listen_http, success_line
from tests.unit.http_fakes import MB, echo, limits, read_all, read_answer, serve, until

FREE = "127.0.0.1:0"
NOTHING = GrpcApp({}, max_message_bytes=1)


# Addresses


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5500", "127.0.0.1", 5500),
        ("localhost:1", "localhost", 1),
        ("[::1]:65535", "::1", 65535),
        ("::1:80", "::1", 80),
        ("a:b:0080", "a:b", 80),
    ],
)
def test_the_port_follows_the_last_colon(text: str, host: str, port: int) -> None:
    address = parse_address(text, GRPC)
    assert (address.host, address.port, address.path) == (host, port, None)


@pytest.mark.parametrize("kind", [GRPC, RESTFUL])
@pytest.mark.parametrize("text", ["127.0.0.1", "", "127.0.0.1:", ":5500", ":", "h:80a", "h:8 0", "h:\u0661", "h:+1"])
def test_an_illegal_format_is_told(text: str, kind: Any) -> None:
    server = "Serving gRPC" if kind == GRPC else "RESTful server"
    with pytest.raises(ConfigError) as caught:
        parse_address(text, kind)
    assert f"Serving Error: The format of the {server} address '{text}' is illegal" in str(caught.value)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "99999999999999999999"])
def test_a_port_out_of_range_is_told(port: str) -> None:
    text = f"127.0.0.1:{port}"
    wanted = f"The port of the Serving gRPC address '{text}' is out of legal range [1 ~ 65535]"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        parse_address(text, GRPC)
    with pytest.raises(ConfigError, match=re.escape(wanted.replace("Serving gRPC", "RESTful server"))):
        parse_address(text, RESTFUL)


def test_unix_addresses() -> None:
    assert parse_address("unix:some/path:1", GRPC).path == "some/path:1"
    with pytest.raises(ConfigError, match="Empty grpc server unix domain socket address"):
        parse_address("unix:", GRPC)
    for text in ("unix:", "unix:x"):
        with pytest.raises(ConfigError, match="RESTful server does not support binding to unix domain socket"):
            parse_address(text, RESTFUL)


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_an_error(text: str) -> None:
    try:
        address = parse_address(text, GRPC)
    except ConfigError:
        return
    assert address.path or 1 <= address.port <= 65535


def test_a_listener_that_opens_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    LOGGER.propagate = True
    server = Server()
    try:
        with caplog.at_level(logging.INFO, "inflight"):
            http, grpc = server.start_http(ListenConfig(FREE)), server.start_grpc(ListenConfig(FREE))
            with pytest.raises(StartError, match="RESTful server start failed, bind to the socket address"):
                server.start_http(ListenConfig(http))  # who asked is told, and nobody twice
    finally:
        server.stop()
    lines = [(one.levelname, one.getMessage()) for one in caplog.records if "server start" in one.getMessage()]
    assert lines == [("INFO", success_line(RESTFUL, http)), ("INFO", success_line(GRPC, grpc))]


def test_success_lines() -> None:
    assert success_line(GRPC, "unix:x") == "Serving gRPC server start success, listening on unix:x"
    assert success_line(RESTFUL, "h:1") == "Serving RESTful server start success, listening on h:1"


# Binding


def test_a_busy_port_fails_with_both_texts(engine: str) -> None:
    async def run() -> None:
        first = await listen_http(echo, ListenConfig(FREE))
        try:
            bind = f"RESTful server start failed, bind to the socket address {first.address} failed"
            with pytest.raises(StartError, match=re.escape(bind)):
                await listen_http(echo, ListenConfig(first.address))
            create = f"Serving gRPC server start failed, create server failed, address {first.address}"
            with pytest.raises(StartError, match=re.escape(create) + ".*in use"):
                await listen_grpc(NOTHING, ListenConfig(first.address), engine=engine)
        finally:
            await first.close(0)
        again = await listen_grpc(NOTHING, ListenConfig(first.address), engine=engine)  # free at once
        await again.close(0)

    asyncio.run(run())


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "a" * 70, "\udcff"])
def test_a_host_that_is_not_here_fails(host: str) -> None:
    with pytest.raises(StartError, match="bind to the socket address"):
        asyncio.run(listen_http(echo, ListenConfig(f"{host}:5500")))


@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.0.0.1"])
def test_host_names_and_ipv6(host: str) -> None:
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serve(config=ListenConfig(f"{host}:0")) as served:
        assert served.address.startswith(host)
        assert requests.get(f"http://{served.address}/health/live", timeout=5).json() == {"live": True}


@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.0.0.1"])
def test_grpc_on_host_names_and_ipv6(host: str, engine: str) -> None:
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")

    async def run() -> None:
        listener = await listen_grpc(NOTHING, ListenConfig(f"{host}:0"), engine=engine)
        name, _, port = listener.address.rpartition(":")
        assert name == host
        for *_, where in await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            if where[0] != "::1" or _has_ipv6():
                socket.create_connection(where[:2], timeout=5).close()
        await listener.close(0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5)

    asyncio.run(run())


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "a" * 70, "\udcff"])
def test_grpc_on_a_host_that_is_not_here_fails(host: str, engine: str) -> None:
    with pytest.raises(StartError, match="create server failed, address"):
        asyncio.run(listen_grpc(NOTHING, ListenConfig(f"{host}:5500"), engine=engine))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_unix_socket_files(tmp_path: Path, engine: str) -> None:
    async def run() -> None:
        path = tmp_path / "s.sock"
        config = ListenConfig(f"unix:{path}")
        first = await listen_grpc(NOTHING, config, engine=engine)
        assert first.address == f"unix:{path}"
        with pytest.raises(StartError, match="create server failed"):
            await listen_grpc(NOTHING, config, engine=engine)  # a live server is not pushed aside
        await first.close(0)
        assert not path.exists()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        assert path.exists()
        second = await listen_grpc(NOTHING, config, engine=engine)  # what a dead server left is replaced
        await second.close(0)
        path.write_text("not a socket")
        with pytest.raises(StartError):
            await listen_grpc(NOTHING, config, engine=engine)
        assert path.read_text() == "not a socket"
        made = await listen_grpc(NOTHING, ListenConfig(f"unix:{tmp_path}/made/for/s.sock"), engine=engine)
        assert (tmp_path / "made" / "for" / "s.sock").exists()
        await made.close(0)
        assert os.listdir(tmp_path / "made" / "for") == []
        where = f"unix:{path}/s.sock"  # a file lies where the folder should
        with pytest.raises(StartError, match=f"create server failed, address {where}: "):
            await listen_grpc(NOTHING, ListenConfig(where), engine=engine)
        with pytest.raises(StartError):
            await listen_grpc(NOTHING, ListenConfig(f"unix:{tmp_path}/{'x' * 200}"), engine=engine)
        assert sorted(os.listdir(tmp_path)) == ["made", "s.sock"]

    asyncio.run(run())


def test_a_socket_file_of_another_server_stays(tmp_path: Path, engine: str) -> None:
    async def run() -> None:
        path = tmp_path / "s.sock"
        first = await listen_grpc(NOTHING, ListenConfig(f"unix:{path}"), engine=engine)
        path.unlink()
        second = await listen_grpc(NOTHING, ListenConfig(f"unix:{path}"), engine=engine)
        await first.close(0)
        assert path.exists()
        await second.close(0)
        assert not path.exists()

    asyncio.run(run())


# Stopping


def test_close_waits_for_requests_in_flight_and_cuts_idle_ones() -> None:
    with serve() as served:
        idle = socket.create_connection((served.host, served.port), timeout=5)
        idle.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"live" in idle.recv(1000)
        answers: list[requests.Response] = []
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
        client = threading.Thread(
            target=lambda: answers.append(
                requests.post(f"http://{served.address}/v2/models/slow/infer", json=body, timeout=10)
            )
        )
        client.start()
        until(lambda: served.backend.started == 1)
        closing_ = threading.Thread(target=served.close, args=(10.0,))
        closing_.start()
        assert idle.recv(1000) == b""  # at once
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((served.host, served.port), timeout=5)
        assert closing_.is_alive()
        served.release()
        closing_.join(5)
        client.join(5)
        assert answers[0].status_code == 200
        assert answers[0].headers["connection"] == "close"


def test_close_cuts_what_outlasts_the_grace() -> None:
    with serve() as served:
        body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
        failed: list[Exception] = []

        def ask() -> None:
            try:
                requests.post(f"http://{served.address}/v2/models/slow/infer", json=body, timeout=10)
            except requests.exceptions.ConnectionError as error:
                failed.append(error)

        client = threading.Thread(target=ask)
        client.start()
        until(lambda: served.backend.started == 1)
        begin = time.monotonic()
        served.close(0.3)
        assert 0.25 < time.monotonic() - begin < 8
        client.join(5)
        assert failed
        assert served.backend.cancelled == 1


async def endless(scope: Any, receive: Any, send: Any) -> None:
    """An answer without an end, whoever takes it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": bytes(MB), "more_body": True})
        await asyncio.sleep(0)


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_close_cuts_those_who_read_slowly(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """They are given the grace, and then as little time as anybody else."""
    with serve(app=endless, factory=factory) as served, ExitStack() as stack:
        readers = []
        for _ in range(48):
            raw = stack.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.settimeout(10)
            raw.connect((served.host, served.port))
            raw.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
            readers.append(raw)
        begin = time.monotonic()
        served.close(0.5)
        assert 0.4 < time.monotonic() - begin < 10
        for raw in readers:
            read_all(raw)  # comes to its end


def test_close_waits_for_who_reads_slowly_and_not_for_who_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.wire.listen.STALLED", 0.5)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(8 * MB)})

    with serve(app=large) as served, ExitStack() as stack:
        stopped, slow = (stack.enter_context(socket.socket()) for _ in range(2))
        for raw in (stopped, slow):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            raw.settimeout(10)
            raw.connect((served.host, served.port))
            raw.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200 ")
        closing_ = threading.Thread(target=served.close, args=(60.0,))
        closing_.start()
        size = 0
        while data := slow.recv(1 << 17):  # 8 MB in some 1.3 s
            size += len(data)
            time.sleep(0.01)
        assert size + 100 > 8 * MB
        closing_.join(10)
        assert not closing_.is_alive()


def test_close_ends_an_application_that_ignores_its_client() -> None:
    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3600)

    with serve(app=deaf) as served, socket.create_connection((served.host, served.port), timeout=5) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.1)
        served.close(0.1)
        served.close(0.1)  # again: nothing
        assert read_all(raw) == b""


def test_close_lets_a_large_answer_out() -> None:
    with serve(app=echo, limits=limits()) as served:
        with socket.create_connection((served.host, served.port), timeout=10) as raw:
            body = os.urandom(16 * MB)
            raw.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.2)
            closing_ = threading.Thread(target=served.close, args=(10.0,))
            closing_.start()
            time.sleep(0.2)
            reader = raw.makefile("rb")
            assert read_answer(reader) == body
            assert reader.read() == b""
            reader.close()
            closing_.join(5)
            assert not closing_.is_alive()
