"""From starting a server's process to the first token of an answer over HTTP.

    python -m bench.start model.gguf --rounds 5
    python -m bench.start model.gguf --llama-server build/llama.cpp/bin/llama-server --packed /tmp/packed

A round starts each server anew, as a user does: `inflight serve MODEL` and, where its path is given, llama.cpp's
`llama-server -m MODEL`. The clock runs from before the process is started; a client asks again every few milliseconds
until a streamed completion of a short prompt brings its first token. Servers take turns, figures are medians. The
file's pages are read once before, so that all find them in memory. With `--packed` Inflight keeps packed weights in
that folder: its first start fills it and is told apart. `ports` is when the HTTP port takes connections.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.005
PATIENCE = 120.0


@dataclass(frozen=True)
class Start:
    """Times in seconds since the process was started."""

    ports: float
    first_token: float


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def first_token(port: int, process: subprocess.Popen[bytes], until: float) -> None:
    """Returns when a streamed completion has sent its first event.

    Raises:
        RuntimeError: the server ended.
        TimeoutError: the event did not come in time.
    """
    body = json.dumps({"model": "model", "prompt": "Once upon a time", "max_tokens": 4, "stream": True})
    while time.perf_counter() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=until - time.perf_counter())
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200 and answer.readline().startswith(b"data:"):
                return
        except (OSError, http.client.HTTPException):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}") from None
        finally:
            connection.close()
        time.sleep(PAUSE)
    raise TimeoutError("no token came")


def listens(port: int, process: subprocess.Popen[bytes], until: float) -> None:
    while time.perf_counter() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(PAUSE)
    raise TimeoutError("the server does not listen")


def measure(command: Sequence[str], port: int, kept: str | None = None) -> Start:
    """Measures one start. Args: kept: a folder; the server is stopped when its packed weights are written there."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        listens(port, process, began + PATIENCE)
        ports = time.perf_counter() - began
        first_token(port, process, began + PATIENCE)
        start = Start(ports, time.perf_counter() - began)
        while kept and not list(Path(kept).glob("*.packed")) and time.perf_counter() < began + PATIENCE:
            time.sleep(PAUSE)
        return start
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def inflight(model: Path, port: int, packed: str | None) -> list[str]:
    command = [sys.executable, "-m", "inflight.cli", "serve", str(model), "--name", "model"]
    command += ["--http", f"127.0.0.1:{port}", "--grpc", "off"]
    return command + (["--packed-cache", packed] if packed else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packed", metavar="FOLDER")
    parser.add_argument("--llama-server", metavar="PATH")
    options = parser.parse_args()
    for file in [options.model] if options.model.is_file() else sorted(options.model.rglob("*.safetensors")):
        with file.open("rb") as pages:
            while pages.read(1 << 24):
                pass
    starts: dict[str, list[Start]] = {}

    def turn(name: str, command: Sequence[str], port: int) -> None:
        found = measure(command, port, options.packed if name != "llama.cpp" else None)
        starts.setdefault(name, []).append(found)
        print(f"{name}: ports {found.ports:.2f} s, first token {found.first_token:.2f} s", flush=True)

    if options.packed:
        port = free_port()
        turn("inflight, first start", inflight(options.model, port, options.packed), port)
    for _ in range(options.rounds):
        port = free_port()
        turn("inflight", inflight(options.model, port, options.packed), port)
        if options.llama_server:
            port = free_port()
            turn("llama.cpp", [options.llama_server, "-m", str(options.model), "--port", str(port)], port)
    print("\nmedians")
    for name, all_of in starts.items():
        ports = statistics.median(each.ports for each in all_of)
        token = statistics.median(each.first_token for each in all_of)
        print(f"{name:24} ports {ports:6.2f} s   first token {token:6.2f} s   of {len(all_of)}")


if __name__ == "__main__":
    main()
