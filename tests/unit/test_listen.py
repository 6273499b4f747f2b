"""Listeners with real sockets: addresses, TLS, unix sockets, gRPC channels, stopping."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
import trustme
from hypothesis import given
from hypothesis import strategies as st

from inflight.config import ListenConfig, TlsConfig
from inflight.errors import ConfigError, StartError
from inflight.frontends.address import GRPC, RESTFUL, parse_address
from inflight.frontends.listen import Listener, listen_grpc, listen_http, success_line
from tests.unit.http_fakes import MB, Loop, echo, limits, read_all, read_answer, serve, until

FREE = "127.0.0.1:0"


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


def test_success_lines() -> None:
    assert success_line(GRPC, "unix:x") == "Serving: Serving gRPC server start success, listening on unix:x"
    assert success_line(RESTFUL, "h:1") == "Serving: Serving RESTful server start success, listening on h:1"


# Binding


def test_a_busy_port_fails_with_both_texts() -> None:
    async def run() -> None:
        first = await listen_http(echo, ListenConfig(FREE))
        try:
            bind = f"RESTful server start failed, bind to the socket address {first.address} failed"
            with pytest.raises(StartError, match=re.escape(bind)):
                await listen_http(echo, ListenConfig(first.address))
            create = f"Serving gRPC server start failed, create server failed, address {first.address}"
            with pytest.raises(StartError, match=re.escape(create)):
                await listen_grpc(echo, ListenConfig(first.address))
        finally:
            await first.close(0)
        again = await listen_grpc(echo, ListenConfig(first.address))  # free at once
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


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_unix_socket_files(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s.sock"
        config = ListenConfig(f"unix:{path}")
        first = await listen_grpc(echo, config)
        assert first.address == f"unix:{path}"
        with pytest.raises(StartError, match="create server failed"):
            await listen_grpc(echo, config)  # a live server is not pushed aside
        await first.close(0)
        assert not path.exists()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        assert path.exists()
        second = await listen_grpc(echo, config)  # what a dead server left is replaced
        await second.close(0)
        path.write_text("not a socket")
        with pytest.raises(StartError):
            await listen_grpc(echo, config)
        assert path.read_text() == "not a socket"
        with pytest.raises(StartError):
            await listen_grpc(echo, ListenConfig(f"unix:{tmp_path}/none/s.sock"))
        with pytest.raises(StartError):
            await listen_grpc(echo, ListenConfig(f"unix:{tmp_path}/{'x' * 200}"))

    asyncio.run(run())


def test_a_socket_file_of_another_server_stays(tmp_path: Path) -> None:
    async def run() -> None:
        path = tmp_path / "s.sock"
        first = await listen_grpc(echo, ListenConfig(f"unix:{path}"))
        path.unlink()
        second = await listen_grpc(echo, ListenConfig(f"unix:{path}"))
        await first.close(0)
        assert path.exists()
        await second.close(0)
        assert not path.exists()

    asyncio.run(run())


# TLS


class Pki:
    """A CA for the server and its clients, and a stranger's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.stranger = trustme.CA()
        self.ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        self._write("server", self.ca.issue_cert("localhost", "127.0.0.1"))
        self._write("client", self.ca.issue_cert("client@example.org"))
        self._write("stranger", self.stranger.issue_cert("client@example.org"))

    def _write(self, name: str, made: trustme.LeafCert) -> None:
        made.private_key_pem.write_to_path(self.key(name))
        made.cert_chain_pems[0].write_to_path(self.cert(name))

    def key(self, name: str) -> str:
        return str(self.folder / f"{name}.key")

    def cert(self, name: str) -> str:
        return str(self.folder / f"{name}.crt")

    @property
    def ca_file(self) -> str:
        return str(self.folder / "ca.pem")

    def config(self, *, mutual: bool = False, address: str = FREE) -> ListenConfig:
        tls = TlsConfig(self.cert("server"), self.key("server"), self.ca_file if mutual else None, mutual)
        return ListenConfig(address, tls=tls)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def test_https(pki: Pki) -> None:
    with serve(config=pki.config(), app=echo) as served:
        url = f"https://{served.address}/"
        body = os.urandom(3 * MB)
        with requests.Session() as session:
            session.trust_env = False  # an environment's own CAs would win over this one
            session.verify = pki.ca_file
            for _ in range(3):
                answer = session.post(url, data=body, timeout=10)
                assert answer.content == body
                assert answer.headers["x-body"] == f"memoryview {len(body)}"
            assert session.post(url, data=b"small", timeout=10).content == b"small"
        with pytest.raises(requests.exceptions.SSLError):
            requests.post(url, data=b"", timeout=5)  # not a CA the system knows


def test_old_tls_and_static_keys_are_refused(pki: Pki) -> None:
    with serve(config=pki.config(), app=echo) as served:
        for change in ("version", "cipher"):
            context = ssl.create_default_context(cafile=pki.ca_file)
            if change == "version":
                with pytest.warns(DeprecationWarning, match="TLSv1_1"):
                    context.maximum_version = ssl.TLSVersion.TLSv1_1
            else:
                context.maximum_version = ssl.TLSVersion.TLSv1_2
                context.set_ciphers("AES128-GCM-SHA256")
            with socket.create_connection((served.host, served.port), timeout=5) as raw:
                with pytest.raises((ssl.SSLError, ConnectionResetError)):
                    context.wrap_socket(raw, server_hostname="localhost")


def test_mutual_tls_takes_only_the_configured_ca(pki: Pki) -> None:
    with serve(config=pki.config(mutual=True), app=echo) as served:
        url = f"https://{served.address}/"
        cert = (pki.cert("client"), pki.key("client"))
        assert requests.post(url, data=b"x", verify=pki.ca_file, cert=cert, timeout=5).content == b"x"
        for wrong in (None, (pki.cert("stranger"), pki.key("stranger"))):
            with pytest.raises((requests.exceptions.SSLError, requests.exceptions.ConnectionError)):
                requests.post(url, data=b"x", verify=pki.ca_file, cert=wrong, timeout=5)


def test_wrong_tls_files_are_told(pki: Pki, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no pem")
    good = pki.cert("server"), pki.key("server")
    for tls, text in (
        (TlsConfig(good[0], str(garbage)), f"Serving Error: load private_key from {garbage} failed"),
        (TlsConfig(good[0], "/none.key"), "Serving Error: load private_key from /none.key failed"),
        (TlsConfig(good[0], pki.key("client")), "Serving Error: load private_key from"),
        (TlsConfig(str(garbage), good[1]), "load certificate from"),
        (TlsConfig(*good, custom_ca=str(garbage), verify_client=True), "load custom_ca from"),
        (TlsConfig(*good, verify_client=True), "verify_client needs custom_ca"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            asyncio.run(listen_http(echo, ListenConfig(FREE, tls=tls)))
        with pytest.raises(StartError, match="Serving gRPC server start failed, create server failed, address"):
            asyncio.run(listen_grpc(echo, ListenConfig(FREE, tls=tls)))


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
        assert 0.25 < time.monotonic() - begin < 1.5
        client.join(5)
        assert failed
        assert served.backend.cancelled == 1


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


# gRPC


async def grpc_echo(scope: Any, receive: Any, send: Any) -> None:
    """One unary call whose answer is its request; `/slow` takes a while."""
    data = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        data += message["body"]
        if not message["more_body"]:
            break
    if scope["path"] == "/echo/slow":
        await asyncio.sleep(0.5)
    headers = [(b"content-type", b"application/grpc")]
    await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})
    await send({"type": "http.response.body", "body": data})
    await send({"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]})


class GrpcServed:
    def __init__(self, config: ListenConfig, **options: Any) -> None:
        self.loop = Loop()
        try:
            self.listener: Listener = self.loop.call(listen_grpc(grpc_echo, config, **options))
        except BaseException:
            self.loop.stop()
            raise

    def __enter__(self) -> GrpcServed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.call(self.listener.close(0.0))
        assert self.loop.call(_task_count()) == 1
        self.loop.stop()


async def _task_count() -> int:
    return len(asyncio.all_tasks())


def call(channel: grpc.Channel, path: str = "/echo/echo", data: bytes = b"hello") -> bytes:
    answer: bytes = channel.unary_unary(path)(data, timeout=10)
    return answer


def test_grpc_over_tcp_and_unix(tmp_path: Path) -> None:
    for address in (FREE, f"unix:{tmp_path}/g.sock"):
        with GrpcServed(ListenConfig(address)) as served, grpc.insecure_channel(served.listener.address) as channel:
            assert call(channel) == b"hello"
            assert call(channel, data=bytes(3 * MB)) == bytes(3 * MB)
            calls = [channel.unary_unary("/echo/echo").future(b"%d" % i, timeout=10) for i in range(200)]
            assert [each.result() for each in calls] == [b"%d" % i for i in range(200)]


def test_grpc_over_tls(pki: Pki, tmp_path: Path) -> None:
    root = Path(pki.ca_file).read_bytes()
    cert = Path(pki.cert("client")).read_bytes()
    key = Path(pki.key("client")).read_bytes()
    name = (("grpc.ssl_target_name_override", "localhost"),)
    for mutual in (False, True):
        for address in (FREE, f"unix:{tmp_path}/{mutual}.sock"):
            with GrpcServed(pki.config(mutual=mutual, address=address)) as served:
                own = grpc.ssl_channel_credentials(root, key, cert)
                with grpc.secure_channel(served.listener.address, own, name) as channel:
                    assert call(channel) == b"hello"
                with grpc.secure_channel(served.listener.address, grpc.ssl_channel_credentials(root), name) as channel:
                    if mutual:
                        with pytest.raises(grpc.RpcError) as caught:
                            call(channel)
                        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    else:
                        assert call(channel) == b"hello"


def test_grpc_close_lets_calls_finish() -> None:
    with GrpcServed(ListenConfig(FREE)) as served, grpc.insecure_channel(served.listener.address) as channel:
        call(channel)
        slow = channel.unary_unary("/echo/slow").future(b"x", timeout=10)
        time.sleep(0.2)
        begin = time.monotonic()
        served.loop.call(served.listener.close(5.0))
        assert time.monotonic() - begin < 2
        assert slow.result() == b"x"


def test_a_silent_grpc_peer_is_cut_and_an_idle_one_is_not() -> None:
    with GrpcServed(ListenConfig(FREE), first_byte_timeout=0.3) as served:
        host, _, port = served.listener.address.rpartition(":")
        with grpc.insecure_channel(served.listener.address) as channel:
            call(channel)
            with socket.create_connection((host, int(port)), timeout=5) as silent:
                begin = time.monotonic()
                read_all(silent)  # the server's settings, then the end
                assert time.monotonic() - begin < 2
            seen: list[grpc.ChannelConnectivity] = []
            channel.subscribe(seen.append)
            time.sleep(0.5)
            assert call(channel) == b"hello"
            assert grpc.ChannelConnectivity.IDLE not in seen
