"""Two replicas of a language model, served as they are by default, while one of them is killed or both are renewed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from inflight.cli import main
from inflight.contract import Grammar, Sampling
from inflight.llm import LLM
from tests.e2e.running import Background, Served, connect, eventually, metrics, request, serve

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
JSON = {"Content-Type": "application/json"}
REGEX = "[a-z]{3}( [a-z]{2,9}){60,90}"
COUNT = 120
KINDS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 11, "temperature": 0.9},
    {"grammar": {"type": "regex", "value": REGEX}},
    {"do_sample": True, "seed": 12, "repetition_penalty": 1.2, "grammar": {"type": "regex", "value": REGEX}},
]


def prompt(number: int) -> str:
    return f"Once upon a time, there was a cat called {'Mia' * (number + 1)}."


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The tokens of the model without replicas, of one request after the other."""
    found: list[list[int]] = []
    with LLM(POCKET) as llm:
        for number in range(8):
            kind = dict(KINDS[number % len(KINDS)])
            grammar = Grammar("regex", REGEX) if kind.pop("grammar", None) else None
            (answer,) = llm.generate([prompt(number)], Sampling(**kind), max_new_tokens=COUNT, grammar=grammar)
            found.append(answer.token_ids)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(POCKET, tmp_path_factory.mktemp("models") / "pocket")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("replicas"), str(folder), "--replicas", "2", "--admin") as served:
        yield served
        assert served.end() == 0


def ranks(pid: int) -> list[int]:
    """The processes of all ranks, by replica."""
    found: list[tuple[str, int]] = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            found += [(part, child.pid) for part in child.cmdline() if part.startswith("--device_id=r")]
    return [number for _, number in sorted(found)]


def stream(address: str, number: int, kind: dict[str, Any] | None = None) -> list[int]:
    """The tokens of one stream, in which no event is an error."""
    kind = KINDS[number % len(KINDS)] if kind is None else kind
    body = json.dumps({"inputs": prompt(number), "parameters": {"max_new_tokens": COUNT, **kind}})
    found: list[int] = []
    with contextlib.closing(connect(address, 120)) as connection:
        connection.request("POST", "/generate_stream", body, JSON)
        with connection.getresponse() as response:
            for line in response:
                if line.startswith(b"data: "):
                    frame: Any = json.loads(line[6:])
                    assert "error" not in frame, frame
                    found.append(frame["token"]["id"])
    return found


def of_replicas(address: str, name: str) -> list[float]:
    """The values of a metric, by replica."""
    values = metrics(address)[f"inflight_generator_replica_{name}"]
    return [values["pocket", str(number)] for number in range(2)]


def test_the_same_tokens_as_alone_also_when_a_replica_is_killed(server: Served, alone: list[list[int]]) -> None:
    (first, second) = ranks(server.pid)
    for killed in (first, second):
        eventually(lambda: of_replicas(server.http, "ready") == [1, 1], 60)
        calls = [Background(stream, server.http, number) for number in range(8)]
        eventually(lambda: sum(of_replicas(server.http, "running")) >= 6, 30)
        os.kill(killed, signal.SIGKILL)
        assert [call.result(120) for call in calls] == alone
        assert request(server.http, "GET", "/health")[0] == 200
    assert min(of_replicas(server.http, "requests_total")) >= 5, "requests are divided"
    assert sum(of_replicas(server.http, "taken_over_total")) >= 2


def test_they_work_on_processors_of_their_own(server: Served) -> None:
    eventually(lambda: of_replicas(server.http, "ready") == [1, 1], 60)
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one processor")
    first, second = (set(os.sched_getaffinity(pid)) for pid in ranks(server.pid))
    assert not first & second
    assert len(first) == len(second) == len(allowed) // 2


def test_a_chat_stays_where_it_is_cached(server: Served) -> None:
    eventually(lambda: of_replicas(server.http, "ready") == [1, 1], 60)

    def turn(text: str) -> tuple[str, int]:
        body = json.dumps({"model": "pocket", "prompt": text, "max_tokens": 24, "temperature": 0}).encode()
        status, answer = request(server.http, "POST", "/v1/completions", body, JSON)
        assert status == 200, answer
        told = json.loads(answer)
        return told["choices"][0]["text"], told["usage"]["prompt_tokens_details"]["cached_tokens"]

    chats = [f"{number} little dogs went to the park one sunny day, and they all played. " * 4 for number in range(4)]
    for round_ in range(4):
        for number in range(4):
            text, cached = turn(chats[number])
            assert (cached > 0) == (round_ > 0), (round_, number)
            chats[number] += text + " Then they met a friend."


def renew(server: Served) -> None:
    """Asks for new ranks, and waits until all are loaded."""
    before, told = ranks(server.pid), server.stderr.read_text().count("were started again")
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: server.stderr.read_text().count("were started again") > told, 60)
    assert of_replicas(server.http, "ready") == [1, 1]
    assert not {*before} & {*ranks(server.pid)}


def test_all_replicas_are_renewed_while_streams_run(server: Served, folder: Path, alone: list[list[int]]) -> None:
    eventually(lambda: of_replicas(server.http, "ready") == [1, 1], 60)
    calls = [Background(stream, server.http, number) for number in range(8)]
    renew(server)
    assert [call.result(120) for call in calls] == alone

    weights = load_file(folder / "model.safetensors")
    name = next(each for each in weights if each.endswith("norm.weight") and "layers" not in each)
    weights[name] = weights[name] * np.linspace(0.2, 1.8, weights[name].size).astype(weights[name].dtype)
    save_file(weights, folder / "new")
    os.replace(folder / "new", folder / "model.safetensors")
    calls = [Background(stream, server.http, number) for number in range(4)]
    assert main(["models", "load", "pocket", "--rolling", "--address", f"http://{server.http}"]) == 0
    assert of_replicas(server.http, "ready") == [1, 1]
    assert all(call.result(120) for call in calls), "a stream that moves goes on, maybe with the new weights"
    with LLM(folder) as llm:
        (changed,) = llm.generate([prompt(0)], max_new_tokens=COUNT)
    assert changed.token_ids != alone[0]
    assert [stream(server.http, 0) for _ in range(2)] == [changed.token_ids] * 2
