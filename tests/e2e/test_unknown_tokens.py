"""A model whose tokenizer knows a token that its embedding does not: every door refuses it, no rank dies of it.

And a token whose embedding is no number: there the model is to blame, and every door says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from inflight.client import Client
from tests.e2e.running import Background, Served, request, serve, workers
from tests.lm import more_tokens_than_rows, reference, reference_tokens

WRONG = "a cat <image> here"
STAGES = """
from inflight.servable import add_stage, declare_generator, register_method

model = declare_generator("MODEL")

def ask(text):
    return f"Tell: {text if isinstance(text, str) else bytes(text).decode()}"

@register_method(output_names=["y"])
def tell(text):
    prompt = add_stage(ask, text, outputs_count=1)
    return add_stage(model, prompt, outputs_count=1)
"""
CHAT = {"messages": [{"role": "user", "content": WRONG}], "max_tokens": 5}
DOORS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": WRONG, "parameters": {"max_new_tokens": 5}}),
    ("/generate_stream", {"inputs": WRONG, "parameters": {"max_new_tokens": 5}}),
    ("/", {"inputs": WRONG, "parameters": {"max_new_tokens": 5}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": WRONG, "max_tokens": 5}),
    ("/v1/completions", {"prompt": [5, 2048], "max_tokens": 5}),
    ("/v1/completions", {"prompt": [[5], [1 << 40]], "max_tokens": 5, "echo": True}),
    ("/v1/completions", {"prompt": "a cat", "max_tokens": 5, "logit_bias": {"2048": 5}}),
    ("/v1/completions", {"prompt": "a cat", "max_tokens": 5, "top_k": 1 << 70}),
    ("/v1/responses", {"input": WRONG, "max_output_tokens": 5}),
    ("/v1/embeddings", {"input": ["a cat", WRONG]}),
    ("/v1/embeddings", {"input": [5, 2049]}),
    ("/v2/models/told/generate", {"text_input": WRONG, "parameters": {"max_tokens": 5}}),
    ("/v2/models/told/infer", {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [WRONG]}]}),
    ("/models/told/generate_stream", {"inputs": WRONG, "parameters": {"max_new_tokens": 5}}),
]  # fmt: skip


LEADING = "a dog"
"""A prompt whose continuation has the token that is no number."""


@dataclass(frozen=True)
class Model:
    """A model with a broken embedding.

    Attributes:
        broken: a token whose embedding is no number: the first greedy one after LEADING.
        text: a prompt that has it.
    """

    folder: Path
    broken: int
    text: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = more_tokens_than_rows(tmp_path_factory.mktemp("more") / "model", max_position_embeddings=8192)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (broken,) = reference_tokens(reference(folder), tokenizer.encode(LEADING).ids, 1)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][broken] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = f"a cat{tokenizer.decode([broken])}"
    assert broken in tokenizer.encode(text).ids
    return Model(folder, broken, text)


@pytest.fixture(scope="module")
def served(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("more")
    (root / "told").mkdir()
    (root / "told" / "servable_config.py").write_text(STAGES.replace("MODEL", str(model.folder)))
    with serve(root, str(root / "told")) as one:
        yield one


def post(address: str, path: str, body: Any) -> tuple[int, str]:
    status, data = request(address, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return status, data.decode()


def test_every_door_refuses_and_nobody_else_notices(served: Served) -> None:
    good = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 100, "details": True}}
    alone = post(served.http, "/generate", {**good, "parameters": {**good["parameters"], "do_sample": False}})
    before = workers(served.pid)
    beside = Background(lambda: [post(served.http, "/generate", good)[0] for _ in range(5)])
    for path, body in DOORS:
        status, text = post(served.http, path, body)
        assert status in (400, 422), (path, status, text)
        if "logit_bias" not in body and "top_k" not in body:
            assert "does not exist in this model, whose tokens are 0 to 2047" in text, (path, text)
    for method, given in (("generate", {"inputs": WRONG}), ("tell", {"text": WRONG})):
        status, text = post(served.http, f"/model/told:{method}", {"instances": [given]})
        assert "'<image>'" in json.loads(text)["error_msg"], text
        with Client(served.grpc, "told", method) as client:
            assert "'<image>'" in str(client.infer([given]))
    assert beside.result() == [200] * 5
    assert workers(served.pid) == before, "a process died"
    again = post(served.http, "/generate", {**good, "parameters": {**good["parameters"], "do_sample": False}})
    assert json.loads(again[1])["generated_text"] == json.loads(alone[1])["generated_text"]


def test_every_door_says_that_the_model_is_to_blame(served: Served, model: Model) -> None:
    """In every protocol's form of an error of its own, whether the prompt brings it or an answer comes to it."""
    good = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40, "do_sample": False}}
    alone, before = post(served.http, "/generate", good), workers(served.pid)
    beside = Background(lambda: [post(served.http, "/generate", good) for _ in range(3)])
    for path, body in DOORS:
        if WRONG in json.dumps(body):
            status, answer = post(served.http, path, json.loads(json.dumps(body).replace(WRONG, model.text)))
            tgi = path.startswith(("/generate", "/models/")) or path == "/"
            assert status == (424 if tgi else 500), (path, status, answer)
            assert "not all numbers" in answer, (path, answer)
            if path.startswith("/v1/"):
                assert json.loads(answer)["error"]["type"] == "server_error"
    # Greedy rows take the engine's own best; others draw, follow a grammar, or ask for log-probabilities.
    for parameters in ({}, {"do_sample": True, "seed": 3, "top_k": 1}, {"top_n_tokens": 2, "details": True}):
        body = {"inputs": LEADING, "parameters": {"max_new_tokens": 5, **parameters}}
        status, answer = post(served.http, "/generate", body)
        assert (status, json.loads(answer)["error_type"]) == (424, "generation"), answer
    status, answer = post(served.http, "/generate_stream", {"inputs": LEADING, "parameters": {"max_new_tokens": 5}})
    first, second = (json.loads(frame[5:]) for frame in answer.split("\n\n")[:2])
    assert (status, first["token"]["id"], second["error_type"]) == (200, model.broken, "generation")
    for method, given in (("generate", {"inputs": model.text}), ("tell", {"text": model.text})):
        answer = json.loads(post(served.http, f"/model/told:{method}", {"instances": [given]})[1])
        assert "not all numbers" in answer["error_msg"], answer
        with Client(served.grpc, "told", method) as client:
            assert "not all numbers" in str(client.infer([given]))
    assert beside.result() == [alone] * 3
    assert workers(served.pid) == before, "a process died"
