"""Embedders, classifiers and rerankers at the doors of TEI, Cohere, Jina, vLLM and OpenAI, over real engines."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openai
import pytest
import requests
import torch
import transformers
from huggingface_hub import InferenceClient

from inflight.config import GeneratorConfig, ModelConfig, RestConfig
from inflight.contract import ShardJob
from inflight.engine import Engine
from inflight.frontends.app import http_app
from inflight.llm.local import LocalExecutor
from inflight.metrics import Load, Metrics
from inflight.text import load_tokenizer
from tests import sentence_folders
from tests.seeing import SeeingBackend
from tests.unit.http_fakes import serve

QUERY = "the quick fox"
TEXTS = ["the lazy dog", "one two three four", "quick quick fox"]
LABELS = {"classifier": {0: "sad", 1: "calm", 2: "glad"}, "reranker": {0: "LABEL_0"}}
POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"


class Doors:
    """The HTTP ports of an embedder, a classifier, a reranker and a model that writes."""

    def __init__(self, root: Path, addresses: dict[str, str], metrics: Metrics) -> None:
        self.root = root
        self.metrics = metrics
        self.addresses = addresses

    def post(self, kind: str, path: str, body: Any) -> tuple[int, Any]:
        answer = requests.post(f"http://{self.addresses[kind]}{path}", json=body, timeout=30)
        return answer.status_code, answer.json()

    def good(self, kind: str, path: str, **body: Any) -> Any:
        status, answer = self.post(kind, path, body)
        assert status == 200, answer
        return answer

    def good_info(self, kind: str) -> Any:
        return requests.get(f"http://{self.addresses[kind]}/info", timeout=30).json()

    def logits(self, kind: str, *texts: tuple[str, ...]) -> np.ndarray:
        """transformers' own."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.root / kind)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(self.root / kind).eval()
        with torch.inference_mode():
            return np.stack([model(**tokenizer(*one, return_tensors="pt")).logits[0].numpy() for one in texts])


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    root = tmp_path_factory.mktemp("models")
    sentence_folders.make(root / "embedding", "layers")
    for kind, labels in LABELS.items():
        sentence_folders.make(root / kind, "old")
        (root / kind / "modules.json").unlink()
        config = transformers.BertConfig.from_pretrained(root / kind, id2label=labels, initializer_range=0.4)
        torch.manual_seed(3)
        transformers.BertForSequenceClassification(config).save_pretrained(root / kind)
    sentence_folders.make(root / "sparse", "old")
    (root / "sparse" / "modules.json").unlink()
    config = transformers.BertConfig.from_pretrained(root / "sparse", initializer_range=0.4)
    transformers.BertForMaskedLM(config).save_pretrained(root / "sparse")
    metrics = Metrics()
    metrics.generations.watch(Load)
    with ExitStack() as stack:
        addresses: dict[str, str] = {}
        for kind in ("embedding", *LABELS, "sparse", "writer"):
            folder = POCKET if kind == "writer" else root / kind
            model = ModelConfig(folder, "cpu", "float32", kv_cache_bytes=8 << 20)
            model = msgspec.structs.replace(model, pooling="splade" if kind == "sparse" else None)
            tokenizer, executor = load_tokenizer(folder), LocalExecutor(ShardJob(model, max_step_tokens=2048))
            engine = Engine(GeneratorConfig(model, kind), tokenizer, executor, metrics=metrics)
            backend = SeeingBackend()
            backend.generators = {kind: engine}  # type: ignore[dict-item]
            app = http_app(backend, max_body_bytes=8 << 20, rest=RestConfig(), metrics=metrics)
            served = stack.enter_context(serve(app=app))
            served.loop.call(engine.start())
            stack.callback(served.loop.call, engine.stop())
            addresses[kind] = served.address
        yield Doors(root, addresses, metrics)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def cosines(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[1:] @ vectors[0]


def test_vectors(doors: Doors) -> None:
    raw = np.array(doors.good("embedding", "/embed", inputs=[QUERY, *TEXTS], normalize=False))
    unit = np.array(doors.good("embedding", "/embed", inputs=[QUERY, *TEXTS]))
    assert np.allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    one = doors.good("embedding", "/embed", inputs=QUERY)
    assert one == unit[:1].tolist()
    short = np.array(doors.good("embedding", "/embed", inputs=QUERY, dimensions=3))
    assert np.allclose(short[0], raw[0, :3] / np.linalg.norm(raw[0, :3]), atol=1e-6)
    tokens = doors.good("embedding", "/tokenize", inputs=[QUERY])[0]
    ids = [each["id"] for each in tokens]
    assert doors.good("embedding", "/embed", inputs=[ids]) == one
    states = np.array(doors.good("embedding", "/embed_all", inputs=[QUERY, "fox"])[0])
    assert states.shape == (len(ids), sentence_folders.WIDTH)
    model = transformers.BertModel.from_pretrained(doors.root / "embedding").eval()
    with torch.inference_mode():
        assert np.allclose(states, model(torch.tensor([ids])).last_hidden_state[0].numpy(), atol=1e-4)
    given = {"source_sentence": QUERY, "sentences": TEXTS}
    assert np.allclose(doors.good("embedding", "/similarity", inputs=given), cosines(raw), atol=1e-5)
    assert np.allclose(doors.good("embedding", "/", inputs=given), cosines(raw), atol=1e-5)
    assert doors.good("embedding", "/", inputs=QUERY) == one


def test_sparse_vectors(doors: Doors) -> None:
    """SPLADE's: of log(1 + relu(logit)) the largest over all tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(doors.root / "sparse")
    model = transformers.BertForMaskedLM.from_pretrained(doors.root / "sparse").eval()
    texts = [QUERY, "fox " * 20, *TEXTS]
    found = doors.good("sparse", "/embed_sparse", inputs=texts)
    for text, sparse in zip(texts, found, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        wanted = torch.log1p(torch.relu(logits)).amax(0).numpy()
        assert [each["index"] for each in sparse] == np.flatnonzero(wanted).tolist()
        assert np.allclose([each["value"] for each in sparse], wanted[wanted > 0], atol=1e-5)
    assert doors.good("sparse", "/embed_sparse", inputs=QUERY) == found[:1]
    assert doors.good("sparse", "/", inputs=QUERY) == found[:1]
    assert doors.good_info("sparse")["model_type"] == {"embedding": {"pooling": "splade"}}


def test_what_dashboards_of_tei_read(doors: Doors) -> None:
    """Names and labels of text-embeddings-inference's metrics."""

    def read() -> dict[tuple[str, str], float]:
        lines = [line for line in doors.metrics.render().decode().splitlines() if line.startswith("te_")]
        split = [line.rpartition(" ") for line in lines]
        return {(name.partition("{")[0], name.partition("{")[2].rstrip("}")): float(value) for name, _, value in split}

    before = read()
    doors.good("embedding", "/embed", inputs=[QUERY, *TEXTS])
    doors.good("embedding", "/embed", inputs=QUERY)
    doors.good("reranker", "/rerank", query=QUERY, texts=TEXTS)
    doors.post("embedding", "/embed", {"inputs": []})
    doors.post("embedding", "/embed", {"inputs": "fox " * 90})
    doors.post("embedding", "/predict", {"inputs": QUERY})
    grown = {key: value - before.get(key, 0.0) for key, value in read().items()}
    for key, count in {
        ("te_request_count", 'method="single"'): 3, ("te_request_success", 'method="single"'): 1,
        ("te_request_count", 'method="batch"'): 3, ("te_request_success", 'method="batch"'): 2,
        ("te_request_failure", 'err="validation"'): 1, ("te_request_failure", 'err="tokenization"'): 1,
        ("te_request_failure", 'err="model_type"'): 1, ("te_request_duration_count", ""): 3,
        ("te_request_tokenization_duration_count", ""): 3, ("te_request_queue_duration_count", ""): 3,
        ("te_request_inference_duration_count", ""): 3, ("te_request_input_length_count", ""): 8,
        ("te_embed_count", ""): 6, ("te_embed_success", ""): 5, ("te_embed_inference_duration_count", ""): 5,
        ("te_predict_count", ""): 3, ("te_predict_success", ""): 3, ("te_predict_queue_duration_count", ""): 3,
        ("te_queue_size", ""): 0,
    }.items():  # fmt: skip
        assert grown[key] == count, key
    assert grown["te_request_inference_duration_sum", ""] > 0
    assert grown["te_batch_next_size_sum", ""] == 8
    assert grown["te_batch_next_tokens_sum", ""] == grown["te_request_input_length_sum", ""]


def test_tokens(doors: Doors) -> None:
    (tokens,) = doors.good("embedding", "/tokenize", inputs=QUERY)
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert [tokens[1][key] for key in ("text", "special", "start", "stop")] == ["the", False, 0, 3]
    ids = [one["id"] for one in tokens]
    assert doors.good("embedding", "/decode", ids=ids) == [QUERY]
    assert doors.good("embedding", "/decode", ids=[ids, ids[:2]], skip_special_tokens=False)[1] == "[CLS] the"
    flat = doors.good("writer", "/tokenize", inputs="Once")
    assert set(flat[0]) == {"id", "text", "start", "stop"}


def test_more_inputs_than_places(doors: Doors) -> None:
    texts = [f"fox {index}" for index in range(300)]
    with openai.OpenAI(base_url=f"http://{doors.addresses['embedding']}/v1", api_key="-") as client:
        floats = client.embeddings.create(model="m", input=texts, encoding_format="float").data
        packed = client.embeddings.create(model="m", input=texts).data  # base64
    assert len(floats) == 300
    assert all(np.allclose(a.embedding, b.embedding, atol=1e-7) for a, b in zip(floats, packed))
    assert len(doors.good("embedding", "/embed", inputs=texts)) == 300


def test_labels(doors: Doors) -> None:
    found = doors.logits("classifier", (QUERY,), (QUERY, TEXTS[0]), (TEXTS[1],))
    shares, names = softmax(found), list(LABELS["classifier"].values())
    answer = doors.good("classifier", "/predict", inputs=QUERY)
    assert [one["label"] for one in answer] == [names[index] for index in np.argsort(-shares[0])]
    assert np.allclose([one["score"] for one in answer], -np.sort(-shares[0]), atol=1e-5)
    raw = doors.good("classifier", "/predict", inputs=[QUERY, TEXTS[0]], raw_scores=True)
    assert np.allclose([one["score"] for one in raw], -np.sort(-found[1]), atol=1e-4)
    batch = doors.good("classifier", "/predict", inputs=[[QUERY], [QUERY, TEXTS[0]], [TEXTS[1]]])
    assert np.allclose([[one["score"] for one in each] for each in batch], -np.sort(-shares, axis=1), atol=1e-5)
    assert batch[0] == answer
    assert doors.good("classifier", "/", inputs=QUERY) == answer
    data = doors.good("classifier", "/classify", input=[QUERY, TEXTS[1]])["data"]
    assert np.allclose([one["probs"] for one in data], shares[[0, 2]], atol=1e-5)
    assert data[1]["label"] == names[int(shares[2].argmax())]
    pooled = doors.good("classifier", "/pooling", input=QUERY)["data"][0]["data"]
    assert np.allclose(pooled, shares[0], atol=1e-5)


def test_ranks(doors: Doors) -> None:
    found = doors.logits("reranker", *((QUERY, text) for text in TEXTS))[:, 0]
    order = np.argsort(-found).tolist()
    answer = doors.good("reranker", "/rerank", query=QUERY, texts=TEXTS, return_text=True)
    assert [(one["index"], one["text"]) for one in answer] == [(index, TEXTS[index]) for index in order]
    assert np.allclose([one["score"] for one in answer], sigmoid(found)[order], atol=1e-5)
    raw = doors.good("reranker", "/rerank", query=QUERY, texts=TEXTS, raw_scores=True)
    assert np.allclose([one["score"] for one in raw], found[order], atol=1e-4)
    assert doors.good("reranker", "/", query=QUERY, texts=TEXTS, return_text=True) == answer
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
        best = doors.good("reranker", path, model="m", query=QUERY, documents=documents, top_n=2)
        assert [one["index"] for one in best["results"]] == order[:2]
        assert best["results"][0]["document"] == {"text": TEXTS[order[0]]}
        assert np.allclose([one["relevance_score"] for one in best["results"]], sigmoid(found)[order[:2]], atol=1e-5)
    plain = doors.good("reranker", "/v1/rerank", query=QUERY, documents=TEXTS, return_documents=False, top_n=0)
    assert [set(one) for one in plain["results"]] == [{"index", "relevance_score"}] * 3
    for path in ("/score", "/v1/score"):
        score = doors.good("reranker", path, text_1=QUERY, text_2=TEXTS)
        assert np.allclose([one["score"] for one in score["data"]], sigmoid(found), atol=1e-5)
    same = doors.good("reranker", "/score", queries=[QUERY, QUERY], documents=TEXTS[:2])
    assert [one["score"] for one in same["data"]] == [one["score"] for one in score["data"][:2]]
    vectors = np.array(doors.good("embedding", "/embed", inputs=[QUERY, *TEXTS]))
    near = doors.good("embedding", "/score", text_1=QUERY, text_2=TEXTS)
    assert np.allclose([one["score"] for one in near["data"]], cosines(vectors), atol=1e-5)


def test_a_long_pair_is_cut_at_its_longer_text(doors: Doors) -> None:
    long = "quick dog " * 60
    status, answer = doors.post("reranker", "/rerank", {"query": QUERY, "texts": [long]})
    assert (status, answer["error_type"]) == (413, "Validation")
    assert "less than" in answer["error"]
    cut = doors.good("reranker", "/rerank", query=QUERY, texts=[long], truncate=True, raw_scores=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(doors.root / "reranker")
    most = doors.good_info("reranker")["max_input_length"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(doors.root / "reranker").eval()
    with torch.inference_mode():
        given = tokenizer(QUERY, long, truncation="longest_first", max_length=most, return_tensors="pt")
        assert abs(cut[0]["score"] - float(model(**given).logits[0, 0])) < 1e-4


WRONG: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("embedding", "/embed", {"inputs": []}, 400, "Empty"),
    ("embedding", "/embed", {"inputs": ""}, 400, "Empty"),
    ("embedding", "/embed", {"inputs": QUERY, "dimensions": 99}, 413, "Validation"),
    ("embedding", "/embed", {"inputs": QUERY, "prompt_name": "nobody"}, 413, "Validation"),
    ("embedding", "/embed", {"inputs": "fox " * 90}, 413, "Validation"),
    ("embedding", "/embed_sparse", {"inputs": QUERY}, 424, "Backend"),
    ("sparse", "/embed", {"inputs": QUERY}, 424, "Backend"),
    ("sparse", "/similarity", {"inputs": {"source_sentence": QUERY, "sentences": TEXTS}}, 424, "Backend"),
    ("embedding", "/predict", {"inputs": QUERY}, 424, "Backend"),
    ("embedding", "/rerank", {"query": QUERY, "texts": TEXTS}, 424, "Backend"),
    ("classifier", "/embed", {"inputs": QUERY}, 424, "Backend"),
    ("classifier", "/embed_all", {"inputs": QUERY}, 424, "Backend"),
    ("classifier", "/rerank", {"query": QUERY, "texts": TEXTS}, 424, "Backend"),
    ("classifier", "/predict", {"inputs": [["a", "b", "c"]]}, 413, "Validation"),
    ("writer", "/embed_all", {"inputs": QUERY}, 424, "Backend"),
    ("writer", "/predict", {"inputs": QUERY}, 424, "Backend"),
    ("writer", "/rerank", {"query": QUERY, "texts": TEXTS}, 424, "Backend"),
    ("writer", "/rerank", {"query": QUERY, "documents": TEXTS}, 424, "Backend"),
]


@pytest.mark.parametrize(("kind", "path", "body", "status", "error"), WRONG)
def test_what_cannot_be(doors: Doors, kind: str, path: str, body: Any, status: int, error: str) -> None:
    found, answer = doors.post(kind, path, body)
    assert (found, answer["error_type"]) == (status, error), answer


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [
        ("classifier", "/v1/embeddings", {"input": QUERY}),
        ("classifier", "/v1/rerank", {"query": QUERY, "documents": TEXTS}),
        ("embedding", "/classify", {"input": QUERY}),
        ("reranker", "/score", {"text_1": [QUERY, QUERY], "text_2": TEXTS}),
        ("reranker", "/pooling", {"input": QUERY, "task": "embed"}),
        ("reranker", "/v1/completions", {"model": "m", "prompt": QUERY}),
        ("writer", "/v1/rerank", {"query": QUERY, "documents": TEXTS}),
        ("writer", "/score", {"text_1": QUERY, "text_2": TEXTS}),
    ],
)
def test_what_cannot_be_in_openais_form(doors: Doors, kind: str, path: str, body: Any) -> None:
    status, answer = doors.post(kind, path, body)
    assert status in (400, 422), answer
    assert answer["error"]["message"] if isinstance(answer["error"], dict) else answer["error"]


def test_the_model_is_told(doors: Doors) -> None:
    assert doors.good_info("embedding")["model_type"] == {"embedding": {"pooling": "mean+max"}}
    told = doors.good_info("classifier")["model_type"]["classifier"]
    assert told == {"id2label": {"0": "sad", "1": "calm", "2": "glad"}, "label2id": {"sad": 0, "calm": 1, "glad": 2}}
    assert set(doors.good_info("reranker")["model_type"]) == {"reranker"}
    assert doors.good_info("writer")["model_pipeline_tag"] == "text-generation"


def test_huggingface_hub(doors: Doors) -> None:
    vectors = np.array(doors.good("embedding", "/embed", inputs=[QUERY, *TEXTS]))
    client = InferenceClient(f"http://{doors.addresses['embedding']}")
    assert np.allclose(client.feature_extraction(QUERY), vectors[:1], atol=1e-6)
    near = client.sentence_similarity(QUERY, other_sentences=TEXTS)
    assert np.allclose(near, cosines(vectors), atol=1e-5)
    best = doors.good("classifier", "/predict", inputs=QUERY)
    labelled: Any = InferenceClient(f"http://{doors.addresses['classifier']}").text_classification(QUERY)
    assert (labelled.label, labelled.score) == (best[0]["label"], best[0]["score"])


def test_base64_of_pooling(doors: Doors) -> None:
    data = doors.good("embedding", "/pooling", input=[QUERY], encoding_format="base64")["data"][0]["data"]
    raw = doors.good("embedding", "/embed", inputs=QUERY, normalize=False)[0]
    assert np.frombuffer(base64.b64decode(data), "<f4").tolist() == raw
