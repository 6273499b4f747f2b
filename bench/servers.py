"""Starts the servers of the benchmark. All listen on 127.0.0.1 only."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from bench.models import SERVABLES, mlp_model
from bench.procs import Server, free_port

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PEERS = ROOT / ".venv-peers"


def has_nghttp2() -> bool:
    """Whether the gRPC door's own engine was built."""
    return importlib.util.find_spec("inflight.wire._http2") is not None


def inflight(servable: str, replicas: int = 1, engine: str = "auto") -> Server:
    """Inflight with one of `bench/servables` and its workers; ports `http` and `grpc`.

    Args:
        engine: the HTTP/2 implementation of the gRPC door; by default nghttp2 if it was built.
    """
    http_port, grpc_port = free_port(), free_port()
    command = Path(sys.executable).with_name("inflight")
    argv = [str(command), "serve", str(SERVABLES / servable)]
    argv += ["--http", f"127.0.0.1:{http_port}", "--grpc", f"127.0.0.1:{grpc_port}"]
    argv += ["--grpc-engine", engine]
    argv += ["--device-ids", ",".join(map(str, range(replicas)))]
    argv += ["--status-codes"]  # else the MindSpore form answers 200 to everything, and wrk sees no error
    return Server(
        "Inflight" if engine == "auto" else f"Inflight, gRPC by {engine}",
        argv,
        RESULTS / f"inflight-{servable}-{engine}.log",
        answers(http_port, "/v2/health/ready"),
        ports={"http": http_port, "grpc": grpc_port},
    )


def has_triton() -> bool:
    """Whether `bench/setup_peers.sh` has run."""
    return (PEERS / "triton" / "library_path").exists()


def triton(model: str) -> Server:
    """Triton with one model of `bench/peers/triton_models` on its Python backend; ports `http` and `grpc`.

    The model's process finds its Python through PATH; otherwise it would not use the packages of .venv-peers.
    """
    http_port, grpc_port = free_port(), free_port()
    repository = RESULTS / f"triton-{model}"
    shutil.copytree(Path(__file__).parent / "peers" / "triton_models" / model, repository / model, dirs_exist_ok=True)
    if model == "mlp":
        (repository / model / "1" / "mlp.onnx").write_bytes(mlp_model().SerializeToString())
    argv = [str(PEERS / "triton" / "tritonserver"), "--model-repository", str(repository)]
    argv += ["--backend-directory", str(PEERS / "triton" / "backends"), "--allow-metrics", "false"]
    argv += ["--http-address", "127.0.0.1", "--http-port", str(http_port)]
    argv += ["--grpc-address", "127.0.0.1", "--grpc-port", str(grpc_port)]
    return Server(
        "Triton",
        argv,
        RESULTS / f"triton-{model}.log",
        answers(http_port, "/v2/health/ready"),
        environment={
            "LD_LIBRARY_PATH": (PEERS / "triton" / "library_path").read_text().strip(),
            "PATH": f"{PEERS / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        ports={"http": http_port, "grpc": grpc_port},
    )


def grpc_echo(messages: str) -> Server:
    """A bare grpc.aio server that returns `parsed` messages or `bytes`; port `grpc`."""
    port = free_port()
    argv = [sys.executable, "-m", "bench.peers.grpc_echo", str(port), "--messages", messages]
    log = RESULTS / f"grpc-echo-{messages}.log"
    return Server(f"grpc.aio echo, {messages}", argv, log, _accepts(port), ports={"grpc": port})


def asgi_echo() -> Server:
    """A bare ASGI application on uvicorn that returns every body; port `http`."""
    port = free_port()
    argv = [sys.executable, "-m", "bench.peers.asgi_echo", str(port)]
    return Server("uvicorn echo", argv, RESULTS / "asgi-echo.log", _accepts(port), ports={"http": port})


def socket_echo() -> Server:
    """HTTP by hand on a blocking socket that returns every body, one connection at a time; port `http`."""
    port = free_port()
    argv = [sys.executable, "-m", "bench.peers.socket_echo", str(port)]
    return Server("socket echo", argv, RESULTS / "socket-echo.log", _accepts(port), ports={"http": port})


def answers(port: int, path: str) -> Callable[[], bool]:
    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except http.client.HTTPException:
            return False
        finally:
            connection.close()

    return ready


def _accepts(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True

    return ready
