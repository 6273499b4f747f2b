"""Both clients against a real gRPC server that echoes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from inflight.client import (
    AsyncClient,
    Client,
    ClientGrpcAsyncResult,
    MSServiceServicer,
    SSLConfig,
    add_MSServiceServicer_to_server,
)
from inflight.errors import ConfigError, InvalidRequest
from inflight.proto import ms_service_pb2


class Echo(MSServiceServicer):
    """Answers every instance with its own inputs; the method's name chooses how it fails."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def Predict(self, request: ms_service_pb2.PredictRequest, context: Any) -> ms_service_pb2.PredictReply:
        reply = ms_service_pb2.PredictReply(servable_spec=request.servable_spec)
        method = request.servable_spec.method_name
        if method == "slow":
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(5)
        if method == "fail":
            reply.error_msg.add(error_code=2, error_msg=b"method is not available")
            return reply
        reply.instances.extend(request.instances)
        return reply


@pytest.fixture
def echo() -> Echo:
    return Echo()


def serve(echo: Echo, credentials: Any = None, host: str = "127.0.0.1") -> tuple[Any, str]:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 20)])
    add_MSServiceServicer_to_server(echo, server)
    if credentials is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        port = server.add_secure_port(f"{host}:0", credentials)
    server.start()
    return server, f"{host}:{port}"


@pytest.fixture
def address(echo: Echo) -> Iterator[str]:
    server, address = serve(echo)
    yield address
    server.stop(None).wait()


INSTANCE = {"x": np.ones((2, 2), np.float32), "s": "text", "b": b"raw", "n": 3}


def check(result: Any, count: int) -> None:
    assert isinstance(result, list)
    assert len(result) == count
    for item in result:
        assert (item["x"] == INSTANCE["x"]).all()
        assert (item["s"], item["b"], item["n"].tolist()) == ("text", b"raw", [3])


def test_one_instance_and_several(address: str) -> None:
    with Client(address, "echo", "ok") as client:
        check(client.infer(INSTANCE), 1)
        check(client.infer([INSTANCE, INSTANCE]), 2)
        check(client.infer((INSTANCE,) * 3), 3)


def test_result_arrays_are_read_only(address: str) -> None:
    with Client(address, "echo", "ok") as client:
        result: Any = client.infer(INSTANCE)
    with pytest.raises(ValueError, match="read-only"):
        result[0]["x"][0] = 1


def test_infer_async_answers_later(address: str) -> None:
    with Client(address, "echo", "ok") as client:
        waiting = [client.infer_async(INSTANCE) for _ in range(8)]
        assert all(isinstance(item, ClientGrpcAsyncResult) for item in waiting)
        for item in waiting:
            check(item.result(), 1)


def test_a_failed_request_is_a_dict(address: str) -> None:
    with Client(address, "echo", "fail") as client:
        assert client.infer([INSTANCE]) == {"error": "method is not available"}
        assert client.infer_async([INSTANCE]).result() == {"error": "method is not available"}


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    client = Client("127.0.0.1:1", "echo", "ok")
    result = client.infer(INSTANCE)
    assert isinstance(result, dict)
    assert result["error"].startswith("Grpc Error, (14, 'unavailable'), ")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["UNAVAILABLE", "(14, 'unavailable')"]
    assert result["error"].endswith(lines[-3])
    with pytest.raises(grpc.RpcError):
        client.infer_async(INSTANCE).result()
    client.close()


def test_a_message_over_the_servers_limit(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(address, "echo", "ok") as client:
        result: Any = client.infer({"x": np.zeros(1 << 20, np.float32)})
    assert "Grpc Error, (8, 'resource exhausted')" in result["error"]
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [{"timeout": 0.2}, {}])
def test_a_time_out_of_the_call_or_the_client(address: str, echo: Echo, arguments: dict[str, float]) -> None:
    start = time.monotonic()
    with Client(address, "echo", "slow", timeout=None if arguments else 0.2) as client:
        result: Any = client.infer(INSTANCE, **arguments)
    assert result["error"].startswith("Grpc Error, (4, 'deadline exceeded'), ")
    assert time.monotonic() - start < 3
    assert echo.cancelled.wait(5)


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address, "echo", "ok")
    client.close()
    client.close()
    with pytest.raises(InvalidRequest, match="This client is closed"):
        client.infer(INSTANCE)
    with pytest.raises(InvalidRequest, match="This client is closed"):
        client.infer_async(INSTANCE)


def test_attributes_that_scripts_use(address: str) -> None:
    client = Client(address, "echo", "ok", 4)
    assert (client.address, client.servable_name, client.method_name) == (address, "echo", "ok")
    assert client.version_number == 4
    request = ms_service_pb2.PredictRequest()
    request.servable_spec.version_number = 4
    assert client.stub.Predict(request).servable_spec.version_number == 4
    client.channel.close()
    del client.stub


def test_a_unix_socket(echo: Echo, tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    add_MSServiceServicer_to_server(echo, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    with Client(f"unix:{tmp_path}/s", "echo", "ok") as client:
        check(client.infer(INSTANCE), 1)
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "a", "b"), "Parameter 'address' should be str, but actually <class 'int'>"),
        (("", "a", "b"), "Parameter 'address' should not be empty str"),
        (("a:1", None, "b"), "Parameter 'servable_name' should be str, but actually "),
        (("a:1", "a", ""), "Parameter 'method_name' should not be empty str"),
        (("a:1", "a", "b", "1"), "Parameter 'version_number' should be int, but actually "),
        (("a:1", "a", "b", -1), "Parameter 'version_number' should be >= 0"),
        (("a:1", "a", "b", 0, "tls"), "The type of ssl_config should be type of SSLConfig"),
        (("a:1", "a", "b", 0, SSLConfig("c")), "The certificate and private_key should be passed at the same time"),
        (("a:1", "a", "b", 0, SSLConfig(custom_ca="/no/such")), "Cannot read the file '/no/such'"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_wrong_arguments(kind: Any, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        kind(*arguments)


def test_wrong_certificate_arguments() -> None:
    with pytest.raises(RuntimeError, match="Parameter 'private_key' should be str, but actually <class 'bytes'>"):
        SSLConfig("a", b"b")  # type: ignore[arg-type]


def test_mutual_tls(echo: Echo, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    mine = authority.issue_cert("me@example.org")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    mine.private_key_pem.write_to_path(tmp_path / "key.pem")
    mine.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    credentials = grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    server, address = serve(echo, credentials, "localhost")
    full = SSLConfig(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), str(tmp_path / "ca.pem"))
    with Client(address, "echo", "ok", ssl_config=full) as client:
        check(client.infer(INSTANCE), 1)
    with Client(address, "echo", "ok", ssl_config=SSLConfig(custom_ca=str(tmp_path / "ca.pem"))) as client:
        refused: Any = client.infer(INSTANCE)
        assert "unavailable" in refused["error"]

    async def call() -> Any:
        async with AsyncClient(address, "echo", "ok", ssl_config=full) as client:
            return await client.infer(INSTANCE)

    check(asyncio.run(call()), 1)
    server.stop(None).wait()


def test_async_client_runs_many_at_once(address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address, "echo", "ok") as client:
            for result in await asyncio.gather(*(client.infer(INSTANCE) for _ in range(20))):
                check(result, 1)
        with pytest.raises(InvalidRequest, match="closed"):
            await client.infer(INSTANCE)

    asyncio.run(run())


def test_async_client_returns_failures_without_printing(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def run(where: str, method: str, timeout: float | None = None) -> Any:
        async with AsyncClient(where, "echo", method, timeout=timeout) as client:
            return await client.infer(INSTANCE)

    assert asyncio.run(run(address, "fail")) == {"error": "method is not available"}
    assert "Grpc Error, (14, 'unavailable'), " in asyncio.run(run("127.0.0.1:1", "ok"))["error"]
    assert "Grpc Error, (4, 'deadline exceeded'), " in asyncio.run(run(address, "slow", 0.2))["error"]
    assert capsys.readouterr().out == ""


def test_cancelling_the_task_cancels_the_call(address: str, echo: Echo) -> None:
    async def run() -> None:
        async with AsyncClient(address, "echo", "slow") as client:
            task = asyncio.create_task(client.infer(INSTANCE))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert echo.cancelled.wait(3)
