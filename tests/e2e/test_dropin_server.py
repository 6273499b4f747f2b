"""MindSpore Serving's start-up functions over the real server: scripts in processes of their own, and this one."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspore_serving import server
from mindspore_serving.client import Client
from tests.e2e.running import free_port

CONFIG = """
import numpy as np
from mindspore_serving import log as logger
from mindspore_serving.server import register

def add(x1, x2):
    logger.warning("adding")
    return x1 + x2

@register.register_method(output_names=["y"])
def add_common(x1, x2):
    return register.add_stage(add, x1, x2, outputs_count=1)
"""

INSTANCE = {"x1": np.ones((2, 2), np.float32), "x2": np.full((2, 2), 2, np.float32)}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    server.stop()


@pytest.fixture
def servables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the servable `add`; the working directory is a fresh one."""
    (tmp_path / "servables" / "add").mkdir(parents=True)
    (tmp_path / "servables" / "add" / "servable_config.py").write_text(CONFIG)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "servables"


def open_files() -> int:
    """File descriptors of this process, garbage aside; 0 where the system does not tell."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


def config(servables: Path, **arguments: Any) -> server.ServableStartConfig:
    return server.ServableStartConfig(str(servables), "add", **arguments)


def infer(address: str, version: int = 0) -> Any:
    with Client(address, "add", "add_common", version, timeout=30) as client:
        return client.infer([INSTANCE, INSTANCE])


def check(result: Any) -> None:
    assert isinstance(result, list), result
    assert [item["y"].tolist() for item in result] == [[[3.0, 3.0], [3.0, 3.0]]] * 2


def post(port: int, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/model/add:add_common", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def test_a_servable_of_functions_runs_as_version_one(servables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grpc, rest = free_port(), free_port()
    server.start_servables(config(servables))
    server.start_grpc_server(f"127.0.0.1:{grpc}")
    server.start_restful_server(f"127.0.0.1:{rest}")
    check(infer(f"127.0.0.1:{grpc}"))
    check(infer(f"127.0.0.1:{grpc}", version=1))
    assert post(rest, {"instances": {"x1": 1, "x2": 2}}) == {"instances": [{"y": 3}]}
    assert f"Serving: Serving gRPC server start success, listening on 127.0.0.1:{grpc}" in capsys.readouterr().out
    logs = sorted(path.name for path in Path("serving_logs").iterdir())
    assert logs == ["log_add_extra0_version1.log"]
    assert "adding" in Path("serving_logs", logs[0]).read_text()


def test_doors_before_servables(servables: Path) -> None:
    grpc = free_port()
    server.start_grpc_server(f"127.0.0.1:{grpc}")
    assert "servable is not available" in infer(f"127.0.0.1:{grpc}")["error"]
    server.start_servables([config(servables, device_ids=(0, 1))])
    check(infer(f"127.0.0.1:{grpc}"))


def test_everything_starts_again_after_a_stop(servables: Path) -> None:
    grpc = free_port()
    for _ in range(3):
        server.start_servables(config(servables))
        server.start_grpc_server(f"127.0.0.1:{grpc}")
        check(infer(f"127.0.0.1:{grpc}"))
        server.stop()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", grpc)) != 0


def test_opening_and_closing_a_hundred_times() -> None:
    grpc, rest = free_port(), free_port()

    def once() -> None:
        server.start_grpc_server(f"127.0.0.1:{grpc}")
        server.start_restful_server(f"127.0.0.1:{rest}")
        server.stop()

    once()
    before = open_files()
    for _ in range(100):
        once()
    assert open_files() <= before


def test_starting_twice_tears_everything_down(servables: Path) -> None:
    grpc = free_port()
    server.start_servables(config(servables))
    server.start_grpc_server(f"127.0.0.1:{grpc}")
    with pytest.raises(RuntimeError, match="Serving Error: Serving gRPC server is already running"):
        server.start_grpc_server(f"127.0.0.1:{free_port()}")
    assert "unavailable" in infer(f"127.0.0.1:{grpc}")["error"]


def test_a_busy_port(servables: Path) -> None:
    port = free_port()
    server.start_grpc_server(f"127.0.0.1:{port}")
    with pytest.raises(
        RuntimeError,
        match=f"Serving Error: RESTful server start failed, bind to the socket address 127.0.0.1:{port} failed",
    ):
        server.start_restful_server(f"127.0.0.1:{port}")
    server.start_restful_server(f"127.0.0.1:{port}")
    with pytest.raises(
        RuntimeError,
        match=f"Serving Error: Serving gRPC server start failed, create server failed, address 127.0.0.1:{port}",
    ):
        server.start_grpc_server(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "grpc", "rest"),
    [
        ("no_port", "Serving gRPC address 'no_port' is illegal", "RESTful server address 'no_port' is illegal"),
        ("127.0.0.1:x", "Serving gRPC address '127.0.0.1:x' is", "RESTful server address '127.0.0.1:x' is illegal"),
        ("127.0.0.1:65536", "is out of legal range [1 ~ 65535]", "is out of legal range [1 ~ 65535]"),
        ("127.0.0.1:0", "is out of legal range [1 ~ 65535]", "is out of legal range [1 ~ 65535]"),
        ("unix:", "Empty grpc server unix domain socket address", "does not support binding to unix domain socket"),
    ],
)
def test_wrong_addresses(address: str, grpc: str, rest: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        server.start_grpc_server(address)
    assert grpc in str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        server.start_restful_server(address)
    assert rest in str(caught.value)


def test_a_unix_socket(servables: Path) -> None:
    server.start_servables(config(servables))
    server.start_grpc_server("unix:socket")
    check(infer("unix:socket"))


def test_a_wrong_servable_config_is_reported(servables: Path) -> None:
    (servables / "add" / "servable_config.py").write_text("import no_such_module\n")
    with pytest.raises(RuntimeError, match=r"Fail to start workers: .*import add.servable_config failed, No module"):
        server.start_servables(config(servables))
    server.start_grpc_server(f"127.0.0.1:{free_port()}")


SCRIPT = """
import sys
from mindspore_serving import server
server.start_servables(server.ServableStartConfig("servables", "add"))
server.start_grpc_server(sys.argv[1])
server.start_restful_server(sys.argv[2])
"""


@pytest.fixture
def script(servables: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A start script that has ended, its server alive; the gRPC port. Its servable directory is relative."""
    path = servables.parent / "start.py"
    path.write_text(SCRIPT)
    grpc = free_port()
    command = [sys.executable, str(path), f"127.0.0.1:{grpc}", f"127.0.0.1:{free_port()}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "RESTful server start success" in line:
            break
    time.sleep(0.2)
    yield process, grpc
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_ended_serves_until_a_signal(
    script: tuple[subprocess.Popen[str], int], number: signal.Signals
) -> None:
    process, grpc = script
    check(infer(f"127.0.0.1:{grpc}"))
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", grpc)) != 0


def test_exceptions_of_a_script_end_it(servables: Path) -> None:
    code = f"""
from mindspore_serving import server
server.start_servables(server.ServableStartConfig({str(servables)!r}, "add"))
server.start_grpc_server("nonsense")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "The format of the Serving gRPC address 'nonsense' is illegal" in result.stderr
