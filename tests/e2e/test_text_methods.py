"""A model that only reads texts behind the classic doors, and as a stage: vectors, labels, relevance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.client import Client
from inflight.config import GeneratorConfig, ModelConfig
from inflight.contract import ShardJob
from inflight.engine import Engine
from inflight.errors import InflightError
from inflight.llm import LLM
from inflight.llm.local import LocalExecutor
from inflight.router.stage import generate_method, run_stage
from inflight.router.texts import main_method, run_text, text_method
from inflight.text import load_tokenizer
from tests import sentence_folders
from tests.e2e.curls import answered, curls
from tests.e2e.running import Served, request, serve, write_servable

TEXTS = ["the quick fox", "one two three four"]
STAGES = """
import numpy as np
from inflight.servable import add_stage, declare_generator, register_method

embedder = declare_generator({folder!r})

def near(first, second):
    one, other = embedder.call(first), embedder.call(second)
    return np.float32((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))

@register_method(output_names=["vector"])
def vector(text):
    return add_stage(embedder, text, outputs_count=1)

@register_method(output_names=["cosine"])
def cosine(first, second):
    return add_stage(near, first, second, outputs_count=1)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    sentence_folders.make(root / "embedder", "layers")
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    folder = write_servable(root, "stages", STAGES.format(folder=str(root / "embedder")))
    sentence_folders.make(root / "all-MiniLM-L6-v2", "layers")
    with serve(root, str(folder), str(root / "all-MiniLM-L6-v2")) as one:
        yield one


@pytest.fixture(scope="module")
def vectors(root: Path) -> np.ndarray:
    with LLM(root / "embedder", threads=1) as llm:
        return np.array(llm.embed(TEXTS))


def post(served: Served, path: str, body: Any) -> Any:
    status, data = request(served.http, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert status == 200, data
    return json.loads(data)


def test_classic_doors(served: Served, vectors: np.ndarray) -> None:
    found = post(served, "/model/stages:embed", {"instances": [{"inputs": text} for text in TEXTS]})
    assert np.allclose([one["embedding"] for one in found["instances"]], vectors, atol=1e-6)
    assert all(one["tokens"] > 2 for one in found["instances"])
    short = {"inputs": TEXTS[0], "parameters": json.dumps({"dimensions": 3, "normalize": True})}
    (one,) = post(served, "/model/stages:embed", {"instances": [short]})["instances"]
    assert np.allclose(one["embedding"], vectors[0][:3] / np.linalg.norm(vectors[0][:3]), atol=1e-6)
    client = Client(served.grpc, "stages", "embed")
    assert np.allclose([each["embedding"] for each in client.infer([{"inputs": text} for text in TEXTS])], vectors)
    client = Client(served.grpc, "stages", "score")
    (scored,) = client.infer([{"inputs": TEXTS[0], "document": TEXTS[1]}])
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    assert np.allclose(scored["score"], cosine, atol=1e-6)


def test_open_inference(served: Served, vectors: np.ndarray) -> None:
    about = json.loads(request(served.http, "GET", "/v2/models/stages.embed")[1])
    assert [one["name"] for one in about["outputs"]] == ["embedding", "tokens"]
    tensors = [{"name": "inputs", "shape": [2], "datatype": "BYTES", "data": TEXTS}]
    found = post(served, "/v2/models/stages.embed/infer", {"inputs": tensors})
    outputs = {one["name"]: np.reshape(one["data"], one["shape"]) for one in found["outputs"]}
    assert np.allclose(outputs["embedding"], vectors, atol=1e-6)
    found = post(served, "/v2/models/stages.embed/generate", {"text_input": TEXTS[0]})
    assert np.allclose(found["embedding"], vectors[0], atol=1e-6)


def test_open_inference_over_grpc(served: Served, vectors: np.ndarray) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    with triton.InferenceServerClient(served.grpc) as client:
        given = triton.InferInput("inputs", [2], "BYTES")
        given.set_data_from_numpy(np.array([text.encode() for text in TEXTS], np.object_))
        found = client.infer("all-MiniLM-L6-v2", [given])
        assert np.allclose(found.as_numpy("embedding"), vectors, atol=1e-6)
        assert found.as_numpy("tokens").min() > 2


def test_stages(served: Served, vectors: np.ndarray) -> None:
    found = post(served, "/model/stages:vector", {"instances": [{"text": text} for text in TEXTS]})["instances"]
    assert np.allclose([one["vector"] for one in found], vectors, atol=1e-6)
    (one,) = post(served, "/model/stages:cosine", {"instances": [{"first": TEXTS[0], "second": TEXTS[1]}]})["instances"]
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    assert np.allclose(one["cosine"], cosine, atol=1e-6)


def test_what_the_page_shows(served: Served) -> None:
    embed, rerank = (json.loads(answered(served, command)) for command in curls("generation", "texts"))
    assert len(embed["instances"][0]["embedding"]) > 3
    (best,) = rerank["results"]
    assert best["relevance_score"] <= 1.001


@pytest.mark.parametrize("kind", ["classifier", "reranker", "sparse"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    """Each as a method and as a stage, by the functions that all doors call."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / kind
    sentence_folders.make(folder, "old")
    (folder / "modules.json").unlink()
    labels = {0: "sad", 1: "calm", 2: "glad"} if kind == "classifier" else {0: "LABEL_0"}
    config = transformers.BertConfig.from_pretrained(folder, id2label=labels, initializer_range=0.4)
    made = transformers.BertForMaskedLM if kind == "sparse" else transformers.BertForSequenceClassification
    made(config).save_pretrained(folder)
    model = ModelConfig(folder, "cpu", "float32", pooling="splade" if kind == "sparse" else None)

    async def ask() -> None:
        engine = Engine(GeneratorConfig(model, kind), load_tokenizer(folder), LocalExecutor(ShardJob(model)))
        await engine.start()
        try:
            name = main_method(engine.info)
            assert name == {"classifier": "classify", "reranker": "score", "sparse": "embed_sparse"}[kind]
            method = text_method(engine.info, kind, name)
            assert method is not None
            row = [*TEXTS, "{}"] if kind != "sparse" else TEXTS[:1]
            found = dict(zip([spec.name for spec in method.outputs], await run_text(engine, name, row), strict=True))
            stage: list[Any] = []
            await run_stage(engine, row, stage.append)
            (outcome,) = stage
            if kind == "classifier":
                assert (found["label"], found["scores"].shape) == (labels[int(found["scores"].argmax())], (3,))
                assert np.allclose(outcome[0][0], found["scores"])
                alone = await run_text(engine, name, [TEXTS[0], '{"raw_scores": true}'])
                assert not np.allclose(alone[1].sum(), 1)
            elif kind == "reranker":
                assert 0 < float(found["score"]) < 1
                assert outcome[0][0] == found["score"]
                with pytest.raises(InflightError, match="two texts"):
                    await run_text(engine, name, TEXTS[:1])
            else:
                assert len(found["indices"]) == len(found["values"]) > 0
                assert "embed_sparse" in str(outcome)
            written: list[Any] = []
            await run_stage(engine, TEXTS[:1], written.append, reported=generate_method(kind))
            assert "writes none" in str(written[0])
        finally:
            await engine.stop()

    asyncio.run(ask())
