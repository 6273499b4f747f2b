"""Ranks of a language model that die or hang while the server runs as it does by default.

The context is so long that free memory decides the cache's size: a small one is decided by rows and length.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from inflight.config import GeneratorConfig, ServerConfig
from inflight.server import Server
from tests.e2e.running import Background, connect, eventually, get, process, request, serve

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
JSON = {"Content-Type": "application/json"}
PROMPT = "Once upon a time, there was a young cat called Mia."


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with a context of a million tokens."""
    folder = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))
    return folder


def ranks(pid: int) -> list[int]:
    """The processes of the ranks, in order."""
    found: list[tuple[str, int]] = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            found += [(part, child.pid) for part in child.cmdline() if part.startswith("--device_id=rank")]
    return [number for _, number in sorted(found)]


def health(address: str, path: str = "/health") -> int:
    return request(address, "GET", path)[0]


def generate(address: str, count: int) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": count, "details": True}}
    status, answer = request(address, "POST", "/generate", json.dumps(body).encode(), JSON)
    assert status == 200, answer
    return [token["id"] for token in json.loads(answer)["details"]["tokens"]]


class Stream:
    """A generation that is read on a thread; `begun` is set when some tokens are here."""

    def __init__(self, address: str, count: int) -> None:
        self.begun = threading.Event()
        self._call = Background(self._read, address, count)

    def _read(self, address: str, count: int) -> list[int]:
        found: list[int] = []
        body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": count}})
        with contextlib.closing(connect(address, 120)) as connection:
            connection.request("POST", "/generate_stream", body, JSON)
            with connection.getresponse() as response:
                for line in response:
                    if line.startswith(b"data: "):
                        frame: Any = json.loads(line[6:])
                        assert "error" not in frame, frame
                        found.append(frame["token"]["id"])
                        if len(found) == 5:
                            self.begun.set()
        return found

    def result(self) -> list[int]:
        found: list[int] = self._call.result(120)
        return found


def test_an_idle_model_whose_rank_dies_and_dies_again_while_it_loads(long_context: Path, tmp_path: Path) -> None:
    """By TGI's own command line, which has no flag for the cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["--model-id", str(long_context), "--hostname", "127.0.0.1", "--port", port]
    with process(tmp_path, "-m", "inflight.commands.launcher", *command) as launcher:
        eventually(lambda: ranks(launcher.pid), 60)
        os.kill(ranks(launcher.pid)[0], signal.SIGKILL)  # it has just begun to load, for the first time
        eventually(lambda: "Connected" in launcher.stdout.read_text(), 60)
        address = f"127.0.0.1:{port}"
        before = get(address, "/info")
        assert before["max_total_tokens"] == 1 << 20
        wanted = generate(address, 60)
        (first,) = ranks(launcher.pid)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: health(address) == 503, 5, "an idle model notices at once")
        eventually(lambda: ranks(launcher.pid), 30)
        waiting = Stream(address, 60)
        (loading,) = ranks(launcher.pid)
        os.kill(loading, signal.SIGKILL)
        assert waiting.result() == wanted
        assert health(address) == 200
        assert get(address, "/info") == before
        assert not {first, loading} & set(ranks(launcher.pid))
        assert launcher.end() == 0


def test_a_rank_that_hangs_is_replaced(long_context: Path, tmp_path: Path) -> None:
    with serve(tmp_path, str(long_context), "--step-timeout", "2") as server:
        room = get(server.http, "/info")["max_batch_total_tokens"]
        wanted = generate(server.http, 400)
        for _ in range(20):
            stream = Stream(server.http, 400)
            assert stream.begun.wait(60)
            (hanging,) = ranks(server.pid)
            os.kill(hanging, signal.SIGSTOP)
            assert stream.result() == wanted
            if hanging not in ranks(server.pid):
                break
            os.kill(hanging, signal.SIGCONT)  # on a busy machine it may have computed everything before
        assert hanging not in ranks(server.pid)
        assert get(server.http, "/info")["max_batch_total_tokens"] == room
        assert server.end() == 0


def test_a_rank_that_hangs_while_nothing_is_asked_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.engine.loop.PULSE", 0.1)
    monkeypatch.setattr("inflight.engine.loop.PULSE_TIMEOUT", 1.0)
    server = Server(ServerConfig())
    try:
        server.start_generators([GeneratorConfig.of(POCKET, "pocket")])
        (hanging,) = ranks(os.getpid())
        os.kill(hanging, signal.SIGSTOP)
        eventually(lambda: len(ranks(os.getpid())) == 1 and hanging not in ranks(os.getpid()), 60)
    finally:
        server.stop()
