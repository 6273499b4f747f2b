"""Starts that fail or are ended while they load: by the real commands, with their exit codes and their one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.broken_models import LANGUAGE_MODELS, save_language_model
from tests.e2e.running import (
    Background,
    Served,
    alive,
    ask,
    eventually,
    in_flight,
    process,
    workers,
    write_servable,
)

LAUNCHER = Path(sys.executable).with_name("text-generation-launcher")
SHARD = Path(sys.executable).with_name("text-generation-server")
SERVE = ("-m", "inflight.cli", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
DROPIN = """
from mindspore_serving import server

if __name__ == "__main__":
    server.start_servables(server.ServableStartConfig("servables", "bad"))
"""
SECONDS = 60.0
"""A start that fails takes two on an idle machine."""


def broken(directory: Path, what: str) -> Path:
    folder = save_language_model(directory / what.replace(" ", "_"))
    LANGUAGE_MODELS[what](folder)
    return folder


def start(command: Sequence[object], cwd: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def test_broken_models_end_the_commands(tmp_path: Path) -> None:
    """Exit code 1, one line that names the file, no traceback, no process that hangs. All at once, to save time."""
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(b"hello\n" * 50)
    config = 'raise OSError("the\\nsecond line")'
    write_servable(tmp_path / "servables", "bad", config)
    script = tmp_path / "start.py"
    script.write_text(DROPIN)
    utf16, eos, number = (
        broken(tmp_path, what) for what in ("template in UTF-16", "eos nested", "text_config a number")
    )
    starts = {
        "config.json": start([*SERVE, broken(tmp_path, "config cut")]),
        "cut.onnx": start([*SERVE, cut]),
        "bad.servable_config failed, the second line": start([*SERVE, tmp_path / "servables"]),
        "chat_template.jinja": start([LAUNCHER, "--model-id", utf16, "--port", 0, "--hostname", "127.0.0.1"]),
        "generation_config.json": start([SHARD, "serve", eos, "--uds-path", tmp_path / "shard"]),
        "text_config is 5": start([*SERVE, number, "--log-level", "debug"]),
        "start_servables": start([script], tmp_path),
    }
    for named, started in starts.items():
        out, err = started.communicate(timeout=SECONDS)
        assert started.returncode == 1, (named, err)
        told = [line for line in (out + err).splitlines() if named in line]
        if named == "start_servables":  # a script of MindSpore Serving's: Python prints what it does not catch
            assert "Fail to start workers: import bad.servable_config failed, the" in err
        elif named == "text_config is 5":
            assert "Traceback" in err
        else:
            assert "Traceback" not in out + err
            assert len(told) == 1, out + err


def test_a_signal_while_a_file_does_not_come(tmp_path: Path) -> None:
    """As from a disk that hangs: the launcher ends, with 0."""
    folder = save_language_model(tmp_path / "hangs")
    fifo = folder / "chat_template.jinja"
    os.mkfifo(fifo)
    ends: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody waits for it yet
            ends.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(ends)

    command = [str(LAUNCHER), "--model-id", str(folder), "--hostname", "127.0.0.1", "--port", "0"]
    with process(tmp_path, *command) as served:
        eventually(is_read, SECONDS)
        assert served.end(signal.SIGTERM, SECONDS) == 0
        said = served.stderr.read_text().splitlines()
        assert [line for line in said if ", weights: " not in line] == []  # ranks load meanwhile, and may have
    for end in ends:
        os.close(end)


def gone(pids: Sequence[int]) -> None:
    eventually(lambda: not any(alive(pid) for pid in pids), SECONDS)


def test_a_second_signal(tmp_path: Path) -> None:
    """Ends the process at once, also where the first one waits for a request."""
    busy = """
        import time
        from inflight.servable import add_stage, register_method

        def sleep(x):
            time.sleep(600)
            return x

        @register_method(output_names=["y"])
        def nap(x):
            return add_stage(sleep, x, outputs_count=1)
    """
    folder = write_servable(tmp_path / "busy", "busy", busy) / "busy"
    command = [
        *SERVE[:3],
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "unix:made/for/it.sock",
        "--stop-timeout",
        "500",
        str(folder),
    ]
    with process(tmp_path, *command) as served:
        http = served.line("REST").partition("//")[2]
        socket_file = served.cwd / "made" / "for" / "it.sock"
        assert socket_file.exists()
        pids = workers(served.pid)
        Background(ask, http, "busy", "nap", 1)
        eventually(lambda: in_flight(http) == 1, SECONDS)
        served.process.send_signal(signal.SIGTERM)
        eventually(lambda: not listens(http), SECONDS)
        assert served.process.poll() is None  # it waits for the request
        eventually(lambda: second(served), SECONDS)
        assert served.process.returncode == 128 + signal.SIGTERM
        gone(pids)
        assert not socket_file.exists()


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return False
    return True


def second(served: Served) -> bool:
    """Signals until the process has ended: what comes within half a second of the first is taken for the same."""
    if served.process.poll() is None:
        served.process.send_signal(signal.SIGTERM)
    return served.process.poll() is not None
