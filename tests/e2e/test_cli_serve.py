"""`inflight serve` as a user runs it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.running import free_port
from tests.e2e.running import request as ask_at

CONFIG = """
from mindspore_serving.server import register

def double(x):
    return x * 2

@register.register_method(output_names="y")
def twice(x):
    return register.add_stage(double, x, outputs_count=1)
"""


@pytest.fixture
def servable(tmp_path: Path) -> Path:
    (tmp_path / "calc").mkdir()
    (tmp_path / "calc" / "servable_config.py").write_text(CONFIG)
    return tmp_path / "calc"


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
        command = [sys.executable, "-m", "inflight.cli", "serve", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("try"):
                break
        assert lines, process.communicate()[1]
        return process, lines

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def inflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inflight.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("number", "engine"),
    [(signal.SIGTERM, "auto"), pytest.param(signal.SIGINT, "grpcio", marks=pytest.mark.slow)],
)
def test_serve_call_measure_stop(
    servable: Path,
    number: signal.Signals,
    engine: str,
    serve: Callable[..., tuple[subprocess.Popen[str], list[str]]],
) -> None:
    http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    process, lines = serve(str(servable), "--http", http, "--grpc", grpc, "--grpc-engine", engine)
    assert lines[0].startswith("calc version 1")
    assert f"REST  http://{http}" in lines
    assert f"http://{http}/model/calc:twice" in lines[-1]
    for address in (f"http://{http}", grpc):
        result = inflight("client", address, "calc", "twice", "--input", "x=[1,2]")
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert (answer["instances"] if isinstance(answer, dict) else answer) == [{"y": [2, 4]}]
        result = inflight(
            "bench", address, "calc", "twice", "--input", "x=[1,2]", "--seconds", "0.3", "--connections", "2", "--json"
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["requests"] > 2
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr is not None
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "fork_posix" not in errors


def test_a_busy_port_fails_at_once(servable: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        result = inflight("serve", str(servable), "--http", f"127.0.0.1:{busy.getsockname()[1]}", "--grpc", "off")
    assert result.returncode == 1
    assert result.stderr.startswith("inflight serve: Serving Error: RESTful server start failed, bind to the socket")


def test_a_wrong_address_and_a_wrong_servable(servable: Path) -> None:
    result = inflight("serve", str(servable), "--http", "nonsense", "--grpc", "off")
    assert result.returncode == 2
    assert "The format of the RESTful server address 'nonsense' is illegal" in result.stderr
    (servable / "servable_config.py").write_text("1 / 0\n")
    result = inflight("serve", str(servable), "--http", f"127.0.0.1:{free_port()}", "--grpc", "off")
    assert result.returncode == 1
    assert "import calc.servable_config failed, division by zero" in result.stderr


def test_several_models_from_one_file(
    servable: Path, serve: Callable[..., tuple[subprocess.Popen[str], list[str]]]
) -> None:
    """One checkpoint under two names, with other limits and another precision, and a servable with a worker."""
    http, pocket = f"127.0.0.1:{free_port()}", Path(__file__).resolve().parents[2] / "models" / "pocket"
    file = servable.parent / "inflight.yaml"
    file.write_text(
        f"http: {http}\ngrpc: off\nkv_cache_memory: 8m\nthreads: 1\nmax_total_tokens: 64\nmodels:\n"
        f"  - {{path: {pocket}, name: short}}\n"
        f"  - {{path: {pocket}, name: long, max_total_tokens: 256, quantize: int8}}\n"
        f"  - {{path: {servable}, device_ids: '', workers: 1}}\n"
    )
    process, _ = serve("--config", str(file))
    told = {}
    for name in ("short", "long"):
        body = {"model": name, "prompt": "Once", "max_tokens": 100}
        told[name] = ask_at(
            http, "POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
    assert told["short"][0] == 400
    assert b"maximum context length is 64 tokens" in told["short"][1]
    assert told["long"][0] == 200, told["long"]
    called = inflight("client", f"http://{http}", "calc", "twice", "--input", "x=[1,2]")
    assert json.loads(called.stdout)["instances"] == [{"y": [2, 4]}], called.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
