"""`inflight client` and `inflight bench` against small real servers, and the values they send and print."""

from __future__ import annotations

import base64
import io
import json
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from inflight.cli import main
from inflight.client import MSServiceServicer, add_MSServiceServicer_to_server
from inflight.commands.sample import describe
from inflight.commands.values import parse_input, printable, rest_value
from inflight.config import TlsConfig
from inflight.contract import MethodInfo, ServableStatus, TensorSpec
from inflight.proto import ms_service_pb2
from inflight.router.stage import generate_method


class Rest(BaseHTTPRequestHandler):
    """Answers with the request's own instances; a method named `fail` answers with an error."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Rest.seen.append((self.path, body))
        status, reply = 200, body
        if self.path.endswith(":fail"):
            reply = {"error_msg": "wrong"}
        if self.path.endswith(":missing"):
            status, reply = 404, {"error_msg": "servable is not available"}
        text = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def rest() -> Iterator[str]:
    Rest.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rest)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Echo(MSServiceServicer):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def Predict(self, request: ms_service_pb2.PredictRequest, context: Any) -> ms_service_pb2.PredictReply:
        self.counts.append(len(request.instances))
        reply = ms_service_pb2.PredictReply(servable_spec=request.servable_spec)
        if request.servable_spec.method_name == "fail":
            reply.error_msg.add(error_code=2, error_msg=b"wrong")
        else:
            reply.instances.extend(request.instances)
        return reply


@pytest.fixture
def echo() -> Iterator[tuple[str, Echo]]:
    servicer = Echo()
    server = grpc.server(ThreadPoolExecutor(4))
    add_MSServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("x=1", "int32", ()),
        ("x=1.5", "float32", ()),
        ("x=true", "bool", ()),
        ("x=[[1,2],[3,4]]", "int32", (2, 2)),
        ("x=[1,2.5]", "float32", (2,)),
        ("x:int64=[1,2]", "int64", (2,)),
        ("x:float16=1", "float16", ()),
        ("x:uint8=[]", "uint8", (0,)),
    ],
)
def test_numbers_become_arrays(text: str, dtype: str, shape: tuple[int, ...]) -> None:
    name, value = parse_input(text)
    assert (name, value.dtype.name, value.shape) == ("x", dtype, shape)


def test_texts_and_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float64).T)
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    assert parse_input('x="a=b"') == ("x", "a=b")
    assert parse_input(f"x=@{tmp_path}/b.png") == ("x", b"\x89PNG")
    array = parse_input(f"x=@{tmp_path}/a.npy")[1]
    assert (array.shape, array.dtype.name, array.flags.c_contiguous) == ((3, 2), "float64", True)
    assert parse_input(f"x:float32=@{tmp_path}/a.npy")[1].dtype == np.float32


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("=1", "has no name"),
        ("x=null", "write numbers of one kind"),
        ('x=[1,"a"]', "write numbers of one kind"),
        ("x=[[1],[1,2]]", "inhomogeneous|one kind"),
        ("x=3000000000", "does not fit into int32; name a wider type"),
        ("x:uint8=[-1]", "does not fit into uint8"),
        ("x=hello", "is not JSON"),
    ],
)
def test_values_that_cannot_be_sent(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_input(text)


def test_rest_values_keep_their_type() -> None:
    assert rest_value(np.array([[1, 2]], np.int32)) == [[1, 2]]
    assert rest_value(np.array(1.5, np.float32)) == 1.5
    assert rest_value("a") == "a"
    assert rest_value(b"a") == {"b64": "YQ=="}
    assert rest_value(np.array([1], np.uint8)) == {"b64": "AQ==", "type": "uint8", "shape": [1]}
    assert rest_value(np.array([np.inf], np.float32)) == {"b64": "AACAfw==", "type": "float32", "shape": [1]}
    assert rest_value(np.zeros((2, 0), np.float32)) == {"b64": "", "type": "float32", "shape": [2, 0]}
    assert printable([{"a": np.array([1]), "b": b"a", "c": "t"}]) == [{"a": [1], "b": {"b64": "YQ=="}, "c": "t"}]


def test_client_over_rest(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", rest, "add", "plus", "--input", "x=[1,2]", "--input", 's="a"', "--version", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"instances": [{"x": [1, 2], "s": "a"}]}
    assert Rest.seen[0][0] == "/model/add/version/3:plus"
    for method in ("fail", "missing"):
        assert main(["client", rest, "add", method, "--input", "x=1"]) == 1
        assert "error_msg" in json.loads(capsys.readouterr().out)


def test_client_over_grpc(echo: tuple[str, Echo], capsys: pytest.CaptureFixture[str]) -> None:
    address = echo[0]
    assert main(["client", address, "--input", "x=[1,2]", "add", "plus"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"x": [1, 2]}]
    assert main(["client", address, "add", "fail", "--input", "x=1"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "wrong"}


def test_client_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "http://127.0.0.1:9", "add", "plus", "--input", "x=1"]) == 1
    assert "is the server running?" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["rest", "grpc"])
def test_bench_counts_what_was_answered(
    door: str, rest: str, echo: tuple[str, Echo], capsys: pytest.CaptureFixture[str]
) -> None:
    address = rest if door == "rest" else echo[0]
    arguments = ["bench", address, "add", "plus", "--input", "x=[1,2]", "--seconds", "0.4", "--connections", "3"]
    assert main([*arguments, "--instances", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    seen = len(Rest.seen) if door == "rest" else len(echo[1].counts)
    assert figures["requests"] == seen > 3
    assert figures["errors"] == 0
    assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]
    assert figures["instances_per_second"] == pytest.approx(2 * figures["requests_per_second"], abs=0.11)
    assert 0.4 <= figures["seconds"] < 5
    assert echo[1].counts == [2] * len(echo[1].counts)


@pytest.mark.parametrize("method", ["fail", "missing"])
def test_bench_reports_errors(rest: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", rest, "add", method, "--input", "x=1", "--seconds", "0.1"]) == 1
    written = capsys.readouterr()
    assert "wrong" in written.err or "not available" in written.err
    assert "requests/s" in written.out
    assert "errors       0 " not in written.out


def test_bench_without_a_server_does_not_spin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "127.0.0.1:9", "a", "b", "--input", "x=1", "--seconds", "3", "--connections", "2"]) == 1
    assert "errors       2 of 2" in capsys.readouterr().out


# The line to try


def status(*inputs: TensorSpec, name: str = "add") -> ServableStatus:
    method = MethodInfo(name, 2, "plus", inputs, (TensorSpec("y", "float32", (2,)),))
    return ServableStatus(name, 2, (method,), ready=True, replicas=2, ready_replicas=2)


def test_a_curl_line_that_works(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = rest.removeprefix("http://")
    inputs = (
        TensorSpec("x", "float32", (-1, 2)),
        TensorSpec("n", "int64", ()),
        TensorSpec("s", "str"),
        TensorSpec("b", "bytes"),
        TensorSpec("unknown"),
    )
    text = describe([status(*inputs)], where, "127.0.0.1:8081")
    assert "add version 2, 2 replicas" in text
    assert "plus(x: float32[-1, 2], n: int64[], s: str, b: bytes, unknown) -> y: float32[2]" in text
    line = shlex.split(text.splitlines()[-1].removeprefix("try"))
    assert line[:2] == ["curl", "-d"]
    assert line[3] == f"{rest}/model/add:plus"
    (instance,) = json.loads(line[2])["instances"]
    assert instance["x"] == [[0.0, 0.0]]
    assert instance["n"]["type"] == "int64"
    assert instance["s"] == "text"
    assert "b64" in instance["b"]


def test_a_long_input_comes_from_a_file(tmp_path: Path) -> None:
    text = describe([status(TensorSpec("image", "float32", (224, 224, 3)))], "127.0.0.1:1", None)
    assert "inflight client http://127.0.0.1:1 add plus --input image=@image.npy" in text
    text = describe([status(TensorSpec("n", "int64", (2,)))], None, "127.0.0.1:2", TlsConfig("c", "k", "a", True))
    assert "inflight client 127.0.0.1:2 add plus --input 'n:int64=[0, 0]'" in text
    assert "--tls-ca ca.pem --tls-cert cert.pem --tls-key key.pem" in text


def test_language_models_have_a_line_each_for_text_and_for_images() -> None:
    text, sees = (
        ServableStatus(name, 1, (generate_method(name, name == "sees"),), ready=True, replicas=1, ready_replicas=1)
        for name in ("text", "sees")
    )
    for models, count in (([text, sees], 2), ([sees, text, text], 2), ([sees, sees], 1), ([text], 1)):
        told = describe(models, "127.0.0.1:1", None, generators=["text", "sees"])
        lines = [line.removeprefix("try") for line in told.splitlines() if line.startswith("try ")]
        assert len(lines) == count
        assert ("Tell me a story." in told) == (text in models)
        if sees in models:
            assert "sees, language model that reads images" in told
            *command, body, address = shlex.split(lines[-1])
            assert command == ["curl", "-X", "POST", "-d"]
            assert address == "http://127.0.0.1:1/model/sees:generated_stream"
            file = base64.b64decode(json.loads(body)["instances"]["image"]["b64"])
            assert Image.open(io.BytesIO(file)).size == (48, 48)


def test_the_line_for_our_client_can_be_sent(echo: tuple[str, Echo], capsys: pytest.CaptureFixture[str]) -> None:
    inputs = (TensorSpec("n", "int64", (2,)), TensorSpec("s", "str"), TensorSpec("u"))
    line = describe([status(*inputs)], None, echo[0]).splitlines()[-1].removeprefix("try")
    assert main(shlex.split(line)[1:]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": [0, 0], "s": "text", "u": 0.0}]
