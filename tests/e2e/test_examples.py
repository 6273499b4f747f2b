"""Every example as its README tells: the server script, the client script, the end."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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


@pytest.mark.parametrize("check", [pytest.param(digits, marks=pytest.mark.slow), old_tensor_add, old_add_sub_pipeline])
def test_an_example_in_the_old_style(check: Callable[[str], None], tmp_path: Path) -> None:
    folder = EXAMPLES / check.__name__.removeprefix("old_") / "old_style"
    grpc, http = free_address(), free_address()
    with process(tmp_path, str(folder / "serving_server.py"), grpc, http) as served:
        assert served.line("Serving: Serving gRPC server start success, listening on ") == grpc
        assert served.line("Serving: Serving RESTful server start success, listening on ") == http
        check(call(folder / "serving_client.py", grpc))
        ends_cleanly(served)
        assert [path.name for path in served.cwd.iterdir()] == ["serving_logs"]


@pytest.mark.parametrize("pictures", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_the_lines_that_the_demo_shows_work(light_python: str, tmp_path: Path, pictures: int) -> None:
    """`make demo` is this command on the default ports, in an environment without torch and transformers."""
    makefile = (ROOT / "Makefile").read_text()
    demo = re.search(r"^demo: .*\n\t\$\(BIN\)/inflight serve (.*)$", makefile, re.MULTILINE)
    assert demo
    with serve(tmp_path, *(str(ROOT / path) for path in demo[1].split()), python=light_python) as served:
        found = re.findall(r"^try +(.*)$", served.stdout.read_text(), re.MULTILINE)
        digits, story, picture = (paste(line, served.cwd) for line in found)
        (answer,) = json.loads(digits)["instances"]
        assert answer["label"] == 3
        assert answer["score"] > 0.9
        assert story.startswith("data: {")
        assert story.endswith("data: [DONE]\n\n")
        assert re.fullmatch(
            r"""curl -X POST -d '\{"instances":\{"image":\{"b64":"[\w+/=]+"\}\}\}' """
            r"http://\S+/model/pocket_vision:generated_stream",
            found[2],
        )
        frames = [json.loads(frame.removeprefix("data: ")) for frame in picture.split("\n\n") if frame]
        text = "".join(frame["instances"][0]["text"] for frame in frames)
        assert len(frames) > 3
        assert text == "A red circle on a white background."
        describes_what_it_has_not_seen(served, pictures)
        ends_cleanly(served)


def describes_what_it_has_not_seen(served: Served, pictures: int) -> None:
    """The same answers as transformers' to held-out pictures, and nearly all right, as the model card says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        training: Any = importlib.import_module("train_pocket_vision")
    cases = training.held_out_cases(pictures)
    instances = [{"image": {"b64": base64.b64encode(png(case.picture)).decode()}} for case in cases]
    body = json.dumps({"instances": instances}).encode()
    status, reply = request(served.http, "POST", "/model/pocket_vision:generate", body)
    assert status == 200, reply
    found = [one["generated_text"] for one in json.loads(reply)["instances"]]
    assert found == training.answers(ROOT / "models" / "pocket_vision", cases)
    assert sum(text == case.answer for text, case in zip(found, cases)) >= pictures * 9 // 10


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_crops_of_a_detector_go_to_a_model_that_reads_images(tmp_path: Path) -> None:
    """`examples/postcode`, by the line that serve shows for it."""
    with serve(tmp_path, str(EXAMPLES / "postcode" / "postcode")) as served:
        line = re.findall(r"^try +(curl -d .*)$", served.stdout.read_text(), re.MULTILINE)
        (answer,) = json.loads(paste(line[0], served.cwd))["instances"]
        assert answer["postcode"] == "8046"
        assert answer["descriptions"].splitlines() == [
            f"A blue digit {digit} on a white background." for digit in "8046"
        ]
        ends_cleanly(served)


def paste(line: str, cwd: Path) -> str:
    """What a line prints that is pasted into a terminal."""
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
