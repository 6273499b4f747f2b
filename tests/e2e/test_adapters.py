"""LoRA adapters behind the doors: picked by `adapter_id` or `model`, in one batch, over one rank or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from inflight.llm import LLM
from tests.e2e.running import Background, get, request, serve
from tests.unit.test_lora import save_adapter

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
PROMPT = "Once upon a time, there was a young cat called Mia."
NAMES = (None, "red", "blue")


def generate(address: str, adapter: str | None, **more: Any) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 24, "details": True, "adapter_id": adapter, **more}}
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
