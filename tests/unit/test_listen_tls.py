"""TLS, mutual TLS and gRPC channels over real sockets."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import requests
import trustme
import uvloop

from inflight.config import ListenConfig, TlsConfig
from inflight.errors import ConfigError, StartError
from inflight.wire import GrpcApp, UnaryRpc
from inflight.wire.listen import Listener, listen_grpc, listen_http
from tests.unit.http_fakes import MB, Loop, echo, read_all, serve

FREE = "127.0.0.1:0"


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


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_https(pki: Pki, factory: Any) -> None:
    with serve(config=pki.config(), app=echo, factory=factory) as served:
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


def test_wrong_tls_files_are_told(pki: Pki, tmp_path: Path, engine: str) -> None:
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
        create = f"Serving gRPC server start failed, create server failed, address {FREE}: "
        with pytest.raises(StartError, match=re.escape(create)) as caught:
            asyncio.run(listen_grpc(ECHO, ListenConfig(FREE, tls=tls), engine=engine))
        assert text in str(caught.value)


class Raw:
    """A message of any bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


async def same(request: Any, timeout: float | None) -> Any:
    return request


async def slowly(request: Any, timeout: float | None) -> Any:
    await asyncio.sleep(0.5)
    return request


ECHO = GrpcApp(
    {"/echo/echo": UnaryRpc(cast(Any, Raw), same), "/echo/slow": UnaryRpc(cast(Any, Raw), slowly)},
    max_message_bytes=8 * MB,
)


class GrpcServed:
    def __init__(self, config: ListenConfig, **options: Any) -> None:
        self.loop = Loop()
        try:
            self.listener: Listener = self.loop.call(listen_grpc(ECHO, config, **options))
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


def test_grpc_over_tcp_and_unix(tmp_path: Path, engine: str) -> None:
    for address in (FREE, f"unix:{tmp_path}/g.sock"):
        with (
            GrpcServed(ListenConfig(address), engine=engine) as served,
            grpc.insecure_channel(served.listener.address) as channel,
        ):
            assert call(channel) == b"hello"
            assert call(channel, data=bytes(3 * MB)) == bytes(3 * MB)
            calls = [channel.unary_unary("/echo/echo").future(b"%d" % i, timeout=10) for i in range(200)]
            assert [each.result() for each in calls] == [b"%d" % i for i in range(200)]


def test_grpc_over_tls(pki: Pki, tmp_path: Path, engine: str) -> None:
    root = Path(pki.ca_file).read_bytes()
    cert = Path(pki.cert("client")).read_bytes()
    key = Path(pki.key("client")).read_bytes()
    name = (("grpc.ssl_target_name_override", "localhost"),)
    for mutual in (False, True):
        for address in (FREE, f"unix:{tmp_path}/{mutual}.sock"):
            with GrpcServed(pki.config(mutual=mutual, address=address), engine=engine) as served:
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


def test_grpc_close_lets_calls_finish(engine: str) -> None:
    with (
        GrpcServed(ListenConfig(FREE), engine=engine) as served,
        grpc.insecure_channel(served.listener.address) as channel,
    ):
        call(channel)
        slow = channel.unary_unary("/echo/slow").future(b"x", timeout=10)
        time.sleep(0.2)
        begin = time.monotonic()
        served.loop.call(served.listener.close(5.0))
        assert time.monotonic() - begin < 4
        assert slow.result() == b"x"


def test_a_silent_grpc_peer_is_cut_and_an_idle_one_is_not(engine: str) -> None:
    with GrpcServed(ListenConfig(FREE), engine=engine, first_byte_timeout=0.3) as served:
        host, _, port = served.listener.address.rpartition(":")
        with grpc.insecure_channel(served.listener.address) as channel:
            call(channel)
            with socket.create_connection((host, int(port)), timeout=5) as silent:
                begin = time.monotonic()
                read_all(silent)  # the server's settings, then the end
                assert time.monotonic() - begin < 4
            seen: list[grpc.ChannelConnectivity] = []
            channel.subscribe(seen.append)
            time.sleep(0.5)
            assert call(channel) == b"hello"
            assert grpc.ChannelConnectivity.IDLE not in seen
