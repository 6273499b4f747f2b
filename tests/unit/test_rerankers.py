"""Decoders that score texts, on the CPU engine, against transformers on random checkpoints; cross-encoders' folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.errors import InvalidRequest, StartError, Unable
from inflight.kernels import instruction_sets
from inflight.llm import LLM
from inflight.text import Tokenizer, load_tokenizer
from tests import sentence_folders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native library was not built")

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96, "vocab_size": 2048, "pad_token_id": 0,
}  # fmt: skip
TEMPLATE = (
    "Judge. {% for m in messages if m.role == 'system' %}<I>: {{ m.content }}\n{% endfor %}"
    "<Q>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<D>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }} Answer:"
)
INSTRUCTION = "is it about the same"
YES, NO = 77, 300
QUERY, DOCUMENTS = "Once upon a time", ["a little girl named Lily", "the dog", "One day they went to the park"]


def folder_of(folder: Path, name: str, **settings: Any) -> Path:
    """A random model of one of Qwen3's classes with the pocket's tokenizer."""
    torch.manual_seed(5)
    config = transformers.Qwen3Config(**SIZES, initializer_range=0.3, **settings)
    getattr(transformers, name)(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((POCKET / file).read_bytes())
    return folder


def modules(folder: Path, *kinds: str) -> None:
    entries = [{"path": f"{place}_{kind}" if place else "", "type": f"x.{kind}"} for place, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(entries))


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(POCKET)


def tokens(text: str, add_special_tokens: bool = False) -> Any:
    return torch.tensor([tokenizer().encode(text, add_special_tokens)])


def judged(document: str) -> str:
    return f"Judge. <I>: {INSTRUCTION}\n<Q>: {QUERY}\n<D>: {document} Answer:"


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Path, Any]]:
    """A causal reranker: two tokens' logits behind a chat template with the roles `query` and `document`."""
    folder = folder_of(tmp_path_factory.mktemp("judge"), "Qwen3ForCausalLM")
    modules(folder, "Transformer", "LogitScore")
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": YES, "false_token_id": NO}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    prompts = {"prompts": {"web": INSTRUCTION}, "default_prompt_name": "web"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder).eval()
    with LLM(folder, device_type="cpu", dtype="float32", threads=1, kv_cache_memory=8 << 20) as llm:
        yield llm, folder, model


def odds(model: Any, document: str) -> float:
    with torch.inference_mode():
        logits = model(tokens(judged(document))).logits[0, -1]
    return float(logits[YES] - logits[NO])


def test_a_causal_reranker_scores_as_transformers(judge: tuple[LLM, Path, Any]) -> None:
    llm, _, model = judge
    wanted = sigmoid([odds(model, document) for document in DOCUMENTS])
    found = llm.score(QUERY, DOCUMENTS)
    assert np.allclose(found, wanted, atol=1e-4)
    assert [llm.score(QUERY, one)[0] for one in DOCUMENTS] == found, "alone as in a crowd"
    best = llm.rerank(QUERY, DOCUMENTS, top_n=2)
    assert [one.index for one in best] == np.argsort(-wanted)[:2].tolist()
    assert [(one.score, one.document) for one in best] == [(found[one.index], DOCUMENTS[one.index]) for one in best]
    assert llm.engine.info.pooling is not None
    assert llm.engine.info.pooling.kind == "reranker"


def test_a_long_document_is_cut_and_the_words_behind_it_stay(judge: tuple[LLM, Path, Any]) -> None:
    llm, _, model = judge
    long = "the dog and the girl went home " * 40
    (found,) = llm.score(QUERY, long)
    most = llm.engine.info.limits.max_input_tokens
    cuts = [long[:end] for end in range(1, len(long)) if long[end] == " "]
    fitting = [cut for cut in cuts if tokens(judged(cut)).shape[1] <= most]
    near = sigmoid([odds(model, cut) for cut in fitting[-3:]])
    assert min(abs(near - found)) < 1e-4
    with pytest.raises(InvalidRequest, match="must have less than"):
        llm.score(QUERY, long, truncate=False)


def test_a_reranker_writes_nothing(judge: tuple[LLM, Path, Any]) -> None:
    llm = judge[0]
    with pytest.raises(InvalidRequest, match="scores texts and writes none"):
        llm.generate("Once")
    with pytest.raises(Unable, match="gives no embeddings; it gives scores"):
        llm.embed("Once")


@pytest.mark.parametrize("labels", [1, 3])
def test_a_decoder_with_a_head_of_labels(labels: int, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "Qwen3ForSequenceClassification", num_labels=labels)
    model = transformers.Qwen3ForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = [model(tokens(text, True)).logits[0].numpy() for text in DOCUMENTS]
    with LLM(folder, device_type="cpu", dtype="float32", threads=1, kv_cache_memory=8 << 20) as llm:
        found = llm.classify(DOCUMENTS)
        assert llm.classify(DOCUMENTS[1])[0] == found[1], "alone as in a crowd"
        for one, wanted in zip(found, logits):
            powers = np.exp(wanted - wanted.max())
            shares = powers / powers.sum() if labels > 1 else sigmoid(wanted)
            assert np.allclose(list(one.probabilities.values()), shares, atol=1e-4)
            assert one.label == f"LABEL_{int(wanted.argmax())}"
        if labels > 1:
            with pytest.raises(Unable, match="no relevance"):
                llm.score(QUERY, DOCUMENTS)


def test_a_cross_encoders_folder_with_a_lone_transformer(tmp_path: Path) -> None:
    folder = tmp_path / "cross"
    sentence_folders.make(folder, "old")
    torch.manual_seed(3)
    config = transformers.BertConfig.from_pretrained(folder, num_labels=1, initializer_range=0.4)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    modules(folder, "Transformer")
    cutter = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        wanted = [
            float(model(**cutter("the fox", text, return_tensors="pt", truncation=True)).logits) for text in DOCUMENTS
        ]
    with LLM(folder, device_type="cpu", threads=1) as llm:
        assert np.allclose(llm.score("the fox", DOCUMENTS), sigmoid(wanted), atol=1e-5)


def test_a_model_that_writes_tells_no_relevance(tmp_path: Path) -> None:
    with LLM(POCKET, device_type="cpu", threads=1, kv_cache_memory=8 << 20) as llm:
        with pytest.raises(Unable, match="writes texts, and its states tell no relevance"):
            llm.rerank(QUERY, DOCUMENTS)
        with pytest.raises(Unable, match="gives no classes"):
            llm.classify(QUERY)
        with pytest.raises(InvalidRequest, match="make no pairs"):
            llm.score(["a", "b"], DOCUMENTS)


def test_scores_of_unknown_tokens_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "Qwen3ForCausalLM")
    modules(folder, "Transformer", "LogitScore")
    (folder / "1_LogitScore").mkdir()
    for given, told in (({"true_token_id": "yes"}, "must have a token's number"), ({"true_token_id": 9999}, "2048")):
        (folder / "1_LogitScore" / "config.json").write_text(json.dumps(given))
        with pytest.raises(StartError, match=told):
            LLM(folder, device_type="cpu", threads=1, kv_cache_memory=8 << 20)
