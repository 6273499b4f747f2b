"""LoRA adapters behind the doors: picked by `adapter_id` or `model`, in one batch, over one rank or two; loaded and
unloaded while the model serves."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from inflight.cli import main
from inflight.errors import InvalidRequest
from inflight.llm import LLM
from tests.e2e.running import Background, Served, eventually, get, in_one_batch, request, serve
from tests.e2e.test_replicas import ranks
from tests.unit.test_lora import save_adapter

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
PROMPT = "Once upon a time, there was a young cat called Mia."
NAMES = (None, "red", "blue")


def generate(address: str, adapter: str | None, **more: Any) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 24, "details": True, "adapter_id": adapter} | more}
    headers = {"Content-Type": "application/json"}
    status, data = request(address, "POST", "/generate", json.dumps(body).encode(), headers)
    answer = json.loads(data)
    assert status == 200, answer
    return [token["id"] for token in answer["details"]["tokens"]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[list[int]]]:
    """Two adapters' folders, and the tokens without and with each."""
    parent = tmp_path_factory.mktemp("adapters")
    folders = {name: save_adapter(POCKET, parent / name, seed) for seed, name in enumerate(("red", "blue"), 1)}
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=2, lora_adapters=folders) as llm:
        found = llm.generate([PROMPT] * 3, max_new_tokens=24, ignore_eos=False, adapter=NAMES)
        wanted = [one.token_ids for one in found]
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]
    return folders, wanted


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_adapters(size: int, adapted: tuple[dict[str, Path], list[list[int]]], tmp_path: Path) -> None:
    folders, wanted = adapted
    listed = ",".join(f"{name}={folder}" for name, folder in folders.items())
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "256", "--lora-adapters", listed]
    with serve(tmp_path, str(POCKET), *options, "--tensor-parallel", str(size)) as server:
        calls = [Background(generate, server.http, NAMES[number % 3]) for number in range(12)]
        assert [call.result(60) for call in calls] == [wanted[number % 3] for number in range(12)]
        with openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="-", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["pocket", "red", "blue"]
            texts = [
                client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text
                for model in ("pocket", "red", "blue", "never-heard-of")
            ]
            assert texts[0] == texts[3]
            assert len(set(texts)) == 3
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"inputs": "a", "parameters": {"adapter_id": "green"}}).encode()
        status, data = request(server.http, "POST", "/generate", body, headers)
        assert status == 422
        assert "served here: red, blue" in json.loads(data)["error"]
        assert get(server.http, "/info")["model_id"] == str(POCKET)


@pytest.fixture(scope="module")
def server(
    adapted: tuple[dict[str, Path], list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Two replicas that begin with `red`; `red` and `blue` lie in the server's folder."""
    folder = adapted[0]["red"].parent
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "512", "--replicas", "2", "--admin"]
    options += ["--lora-adapters", f"red={folder / 'red'}", "--repository", str(folder)]
    with serve(tmp_path_factory.mktemp("served"), str(POCKET), *options) as served:
        yield served
        assert served.end() == 0


def change(server: Served, verb: str, **body: Any) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    status, data = request(server.http, "POST", f"/v1/{verb}_lora_adapter", json.dumps(body).encode(), headers)
    return status, data.decode() if status == 200 else json.loads(data)["error"]["message"]


def written(address: str, adapter: str) -> str:
    """A long text."""
    body = {"model": adapter, "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    status, data = request(address, "POST", "/v1/completions", json.dumps(body).encode(), headers)
    assert status == 200, data
    text: str = json.loads(data)["choices"][0]["text"]
    return text


def test_they_come_and_go(server: Served, adapted: tuple[dict[str, Path], list[list[int]]], tmp_path: Path) -> None:
    """By vLLM's routes: requests have the adapter that they began with, also when it is replaced or unloaded, and ranks
    that are started again have those that are loaded then."""
    folders, (plain, red, blue) = adapted
    assert change(server, "load", lora_name="blue", lora_path="blue") == (
        200,
        "Success: LoRA adapter 'blue' added successfully.",
    )
    assert [generate(server.http, name) for name in NAMES * 2] == [plain, red, blue] * 2
    assert [model["id"] for model in get(server.http, "/v1/models")["data"]] == ["pocket", "red", "blue"]
    status, text = change(server, "load", lora_name="blue", lora_path="red")
    assert (status, "has already been loaded" in text) == (400, True)

    whole = written(server.http, "blue")
    running = in_one_batch(server.http, lambda: Background(written, server.http, "blue"), 4, least=3)
    assert change(server, "load", lora_name="blue", lora_path=str(folders["red"]), load_inplace=True)[0] == 200
    assert generate(server.http, "blue") == red
    assert [call.result() for call in running] == [whole] * 4

    for rank in ranks(server.pid):
        os.kill(rank, signal.SIGKILL)
    eventually(lambda: request(server.http, "GET", "/health")[0] == 200, 60)
    assert [generate(server.http, name) for name in NAMES * 2] == [plain, red, red] * 2

    whole = written(server.http, "blue")
    running = in_one_batch(server.http, lambda: Background(written, server.http, "blue"), 2, least=2)
    assert change(server, "unload", lora_name="blue")[0] == 200
    assert generate(server.http, "red") == red
    body = json.dumps({"inputs": "a", "parameters": {"adapter_id": "blue"}}).encode()
    status, data = request(server.http, "POST", "/generate", body, {"Content-Type": "application/json"})
    assert (status, "served here: red" in json.loads(data)["error"]) == (422, True)
    assert [call.result() for call in running] == [whole] * 2
    assert change(server, "unload", lora_name="blue") == (404, "The lora adapter 'blue' cannot be found.")
    # It is the only model, so it answers whatever name, but not that of an adapter that it had.
    for name, wanted in (("never-heard-of", 200), ("blue", 404)):
        body = json.dumps({"model": name, "prompt": "a", "max_tokens": 1}).encode()
        asked = request(server.http, "POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert asked[0] == wanted, asked


def test_loads_that_are_refused(
    server: Served, adapted: tuple[dict[str, Path], list[list[int]]], tmp_path: Path
) -> None:
    save_adapter(POCKET, tmp_path / "outside", 3)
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"lora_name": "a"}, 400, "must be provided"),
        ({"lora_name": "a", "lora_path": str(tmp_path / "outside")}, 400, "in none of the folders"),
        ({"lora_name": "a", "lora_path": "../outside"}, 400, "in none of the folders"),
        ({"lora_name": "a", "lora_path": "nothing"}, 404, "is no adapter"),
        ({"lora_name": "pocket", "lora_path": "blue"}, 400, "is served already"),
        ({"lora_name": "a", "lora_path": "broken"}, 400, "adapter_model.safetensors"),
        ({"lora_name": "a", "lora_path": "blue", "model": "nobody"}, 404, "no language model is named 'nobody'"),
    ]
    broken = adapted[0]["red"].parent / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    for body, wanted, text in cases:
        status, told = change(server, "load", **body)
        assert (status, text in told) == (wanted, True), told


def test_by_the_command(server: Served, adapted: tuple[dict[str, Path], list[list[int]]], capsys: Any) -> None:
    address = ["--address", server.http]
    assert main(["models", "load", "blue", "--adapter-of", "pocket", *address]) == 0
    assert generate(server.http, "blue") == adapted[1][2]
    assert main(["models", "load", "pocket", *address]) == 0  # loaded again, with what came while it served
    assert [generate(server.http, name) for name in NAMES] == adapted[1]
    assert main(["models", "list", *address]) == 0
    assert "an adapter of 'pocket'" in capsys.readouterr().out
    assert main(["models", "unload", "blue", *address]) == 0
    assert main(["models", "unload", "blue", *address]) == 1


def test_by_python(adapted: tuple[dict[str, Path], list[list[int]]]) -> None:
    folders, (plain, _, blue) = adapted
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=2) as llm:
        llm.load_adapter("mine", folders["blue"])
        found = llm.generate([PROMPT] * 2, max_new_tokens=24, adapter=["mine", None])
        assert [one.token_ids for one in found] == [blue, plain]
        with pytest.raises(InvalidRequest, match="already been loaded"):
            llm.load_adapter("mine", folders["red"])
        llm.unload_adapter("mine")
        with pytest.raises(InvalidRequest, match="is not served"):
            llm.generate([PROMPT], adapter="mine")
