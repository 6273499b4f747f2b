"""Every example as its README tells: the server script, the client script, the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.running import FREE, Served, alive, eventually, free_address, process, request, serve, workers

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SUMS = "[[[1.0, 2.0], [3.0, 4.0]], [[2.0, 3.0], [4.0, 5.0]], [[3.0, 4.0], [5.0, 6.0]]]"


def digits(output: str) -> None:
    found = re.search(r"^accuracy ([0-9.]+) on (\d+) (held-out )?images", output, re.MULTILINE)
    assert found, output
    assert float(found[1]) >= 0.97
    assert int(found[2]) in (10, 450)


def tensor_add(output: str) -> None:
    assert f"add_common: {SUMS}" in output
    assert f"add_cast: {SUMS}" in output
    assert 'REST: {"instances":[{"y":[[2.0,3.0],[4.0,5.0]]}]}' in output


def old_tensor_add(output: str) -> None:
    assert output.startswith("add_common [{'y': array([[1., 2.],")
    assert "add_cast [{'y': array([[1., 2.]," in output


def add_sub_pipeline(output: str) -> None:
    assert "predict: [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 2.0], [3.0, 4.0]], [[2.0, 3.0], [4.0, 5.0]]]" in output
    assert "predict_both: [[0.0, 2.0], [4.0, 6.0]] [[0.0, 1.0], [2.0, 3.0]]" in output


def old_add_sub_pipeline(output: str) -> None:
    assert output.startswith("[{'y': array([[-2., -2.],")


def call(script: Path, *addresses: str) -> str:
    """What a client prints; it must end well."""
    done = subprocess.run([sys.executable, str(script), *addresses], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ends_cleanly(served: Served) -> None:
    """SIGTERM ends the server and every process that it started."""
    started = workers(served.pid)
    assert started
    assert served.end() == 0, served.stderr.read_text()
    eventually(lambda: not any(alive(pid) for pid in started), why="a worker is left")
    assert "Traceback" not in served.stderr.read_text()


@pytest.mark.parametrize("check", [digits, tensor_add, add_sub_pipeline])
def test_an_example(check: Callable[[str], None], tmp_path: Path) -> None:
    folder = EXAMPLES / check.__name__
    with process(tmp_path, str(folder / "serving_server.py"), FREE, FREE) as served:
        http, grpc = served.line("HTTP:"), served.line("gRPC:")
        check(call(folder / "serving_client.py", grpc, http))
        ends_cleanly(served)
        assert not list(served.cwd.iterdir())


@pytest.mark.parametrize("check", [digits, old_tensor_add, old_add_sub_pipeline])
def test_an_example_in_the_old_style(check: Callable[[str], None], tmp_path: Path) -> None:
    folder = EXAMPLES / check.__name__.removeprefix("old_") / "old_style"
    grpc, http = free_address(), free_address()
    with process(tmp_path, str(folder / "serving_server.py"), grpc, http) as served:
        assert served.line("Serving: Serving gRPC server start success, listening on ") == grpc
        assert served.line("Serving: Serving RESTful server start success, listening on ") == http
        check(call(folder / "serving_client.py", grpc))
        ends_cleanly(served)
        assert [path.name for path in served.cwd.iterdir()] == ["serving_logs"]


def test_the_line_that_serve_shows_for_the_digits_works(tmp_path: Path) -> None:
    """`make demo` is this command on the default ports."""
    with serve(tmp_path, str(EXAMPLES / "digits" / "digits")) as served:
        found = re.fullmatch(r"curl -d @(\S+) http://(\S+?)(/model/digits:classify)", served.line("try "))
        assert found
        status, reply = request(found[2], "POST", found[3], (served.cwd / found[1]).read_bytes())
        assert status == 200
        (answer,) = json.loads(reply)["instances"]
        assert answer["label"] == 3
        assert answer["score"] > 0.9
        ends_cleanly(served)
