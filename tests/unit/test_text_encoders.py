"""Encoders and classifiers on the CPU engine: transformers' numbers, and the same bits alone and in a crowd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from inflight.config import ModelConfig
from inflight.contract import Array
from inflight.device import open_device
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.llm import LLM
from inflight.models import Text, TextEncoder, load_encoder
from inflight.models.encoder_positions import deberta_places, mpnet_bias
from inflight.models.text_encoder import EngineEncoder, batches
from tests import real
from tests.lm import on_sets

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

_SIZE: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 80,
    "max_position_embeddings": 300, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {"type_vocab_size": 2},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "DistilBert": {"dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 80},
    "ModernBert": {"local_attention": 32, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "NomicBert": {"type_vocab_size": 2},
    "Gte": {"type_vocab_size": 2},
    "MPNet": {"pad_token_id": 1},
    "DebertaV2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": 48,
    },
    "Gemma3Text": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24,
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "use_bidirectional_attention": True, "query_pre_attn_scalar": 20, "initializer_range": 0.1,
    },
}  # fmt: skip
_HEADED = [family for family in _FAMILIES if family != "Gemma3Text"]
_TYPED = ("Bert", "NomicBert", "Gte")


def _texts(count: int = 5) -> list[Array]:
    draw = np.random.default_rng(3)
    return [draw.integers(4, 200, length) for length in (9, 130, 1, 64, 17)[:count]]


def _save(folder: Path, family: str, head: str, **more: Any) -> Any:
    """A random model of the family, with every bias and norm random too."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**_SIZE, **_FAMILIES.get(family, {}), **more})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return model


def _load(folder: Path, **settings: Any) -> TextEncoder:
    return load_encoder(ModelConfig(folder, "cpu", **{"threads": 2, **settings}), open_device("cpu", 0))


@pytest.mark.parametrize("family", _FAMILIES)
def test_states_are_transformers(family: str, tmp_path: Path) -> None:
    model = _save(tmp_path, family, "Model")
    encoder = _load(tmp_path)
    assert isinstance(encoder, EngineEncoder)
    texts = _texts()
    seconds = [3 if family in _TYPED and len(text) > 5 else 0 for text in texts]
    asked = [Text(text, second=second, wanted="tokens") for text, second in zip(texts, seconds)]
    together = encoder.encode(asked)
    for text, found in zip(asked, together):
        given = {"input_ids": torch.tensor(text.tokens)[None]}
        if text.second:
            given["token_type_ids"] = (torch.arange(len(text.tokens)) >= text.second).long()[None]
        with torch.inference_mode():
            wanted = model(**given).last_hidden_state[0].numpy()
        # Gte's random weights lose digits: transformers in float32 is up to 1.7e-4 from float64, the engine 1.9e-4.
        assert np.abs(found - wanted).max() < (4e-4 if family == "Gte" else 2e-4)
        assert (encoder.encode([text])[0] == found).all()
    alone = _load(tmp_path, threads=1)
    assert all((a == b).all() for a, b in zip(alone.encode(asked), together))


@pytest.mark.parametrize("family", _HEADED)
@pytest.mark.parametrize("labels", [1, 3])
def test_scores_are_transformers(family: str, labels: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_labels": labels}
    if family == "ModernBert" and labels == 3:
        more["classifier_pooling"] = "mean"
    model = _save(tmp_path, family, "ForSequenceClassification", **more)
    encoder = _load(tmp_path)
    assert isinstance(encoder, EngineEncoder)
    assert (encoder.tasks, encoder.size) == (("scores",), labels)
    texts = _texts()
    found = encoder.encode([Text(text, wanted="scores") for text in texts])
    for text, scores in zip(texts, found):
        with torch.inference_mode():
            wanted = model(torch.tensor(text)[None]).logits[0].numpy()
        assert scores.shape == (labels,)
        assert np.abs(scores - wanted).max() < 2e-4


def test_a_padding_token_in_a_text(tmp_path: Path) -> None:
    model = _save(tmp_path, "Roberta", "Model")
    tokens = np.array([5, 1, 9, 1, 1, 7])
    with torch.inference_mode():
        ids = torch.tensor(tokens)[None]
        wanted = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].numpy()
    assert np.abs(_load(tmp_path).encode([Text(tokens, wanted="tokens")])[0] - wanted).max() < 2e-4


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
@pytest.mark.parametrize("family", ["Bert", "MPNet", "DebertaV2", "Gemma3Text"])
def test_other_precisions_are_near_and_exact(family: str, settings: dict[str, str], isa: str, tmp_path: Path) -> None:
    _save(tmp_path, family, "Model", initializer_range=0.1)
    texts = [Text(text) for text in _texts()]
    full = _load(tmp_path).encode(texts)
    encoder = _load(tmp_path, cpu_isa=isa, **settings)
    found = encoder.encode(texts)
    assert all(float(np.dot(a, b)) > 0.995 for a, b in zip(full, found))
    assert all((encoder.encode([text])[0] == vector).all() for text, vector in zip(texts, found))


@pytest.mark.parametrize("isa", on_sets())
def test_every_instruction_set_adds_distances(tmp_path: Path, isa: str) -> None:
    """Long texts, so that distances share buckets; queries and keys of distances of DeBERTa's own, as v2 has them."""
    texts = [Text(text, wanted="tokens") for text in _texts()]
    for family, more in (("MPNet", {}), ("DebertaV2", {"share_att_key": False, "position_buckets": -1})):
        model = _save(tmp_path / family, family, "Model", **more)
        with torch.inference_mode():
            wanted = [model(torch.tensor(text.tokens)[None]).last_hidden_state[0].numpy() for text in texts]
        found = _load(tmp_path / family, cpu_isa=isa).encode(texts)
        assert max(float(np.abs(a - b).max()) for a, b in zip(found, wanted)) < 2e-4


@pytest.mark.skipif("amx" not in instruction_sets(), reason="the processor has no AMX")
@pytest.mark.parametrize("inner", [96, 88])  # products write the next one's parts, and they do not
def test_float32_from_parts_is_as_exact_as_floats(inner: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [Text(text, wanted="tokens") for text in _texts()]
    model = _save(tmp_path, "Bert", "Model", intermediate_size=inner).double()
    with torch.inference_mode():
        wanted = [model(torch.tensor(text.tokens)[None]).last_hidden_state[0].numpy() for text in texts]

    def error(isa: str) -> float:
        found = _load(tmp_path, cpu_isa=isa).encode(texts)
        return float(np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, wanted)])))

    with caplog.at_level("INFO", "inflight"):
        assert error("amx") < 1.3 * error("avx512_bf16") < 1e-6
    assert [message.endswith("from bfloat16 parts") for message in caplog.messages] == [True, False]


ELSEWHERE: dict[str, dict[str, Any]] = {
    "Electra": {"embedding_size": 48},
    "ModernBert": {"classifier_activation": "tanh"},
}
"""Settings with which the CPU engine lacks a family, or the activation of its head."""


@pytest.mark.parametrize(
    ("family", "more"),
    [*((family, {}) for family in ("Roberta", "DistilBert", "ModernBert", "MPNet")), *ELSEWHERE.items()],
)
def test_sparse_vectors_of_each_head(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """On the CPU engine, and through transformers what it does not have."""
    model = _save(tmp_path, family, "ForMaskedLM", **more)
    encoder = _load(tmp_path, pooling="splade")
    assert isinstance(encoder, EngineEncoder) == (not more)
    assert (encoder.tasks, encoder.size) == (("sparse",), 200)
    texts = _texts()
    _check_sparse(encoder, model, texts, lambda weights: weights.amax(0))
    alone = [encoder.encode([Text(text, wanted="sparse")])[0] for text in texts]
    assert all((a == b).all() for a, b in zip(alone, encoder.encode([Text(text, wanted="sparse") for text in texts])))


def test_a_folder_says_how_vectors_are_sparse(tmp_path: Path) -> None:
    """sentence-transformers' SpladePooling: sums, and log1p twice. `--pooling` overrides a folder."""
    model = _save(tmp_path, "Bert", "ForMaskedLM")
    kinds = ["MLMTransformer", "SpladePooling"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.sparse_encoder.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, ["", "1_SpladePooling"]))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_SpladePooling").mkdir()
    settings = {"pooling_strategy": "sum", "activation_function": "log1p_relu", "word_embedding_dimension": 200}
    (tmp_path / "1_SpladePooling" / "config.json").write_text(json.dumps(settings))
    _check_sparse(_load(tmp_path), model, _texts(), lambda weights: torch.log1p(weights).sum(0))
    dense = _load(tmp_path, pooling="cls")
    states = dense.encode([Text(_texts()[0], wanted="tokens")])[0]
    vector = dense.encode([Text(_texts()[0])])[0]
    assert np.allclose(vector, states[0] / np.linalg.norm(states[0]), atol=1e-6)
    (tmp_path / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "mean"}')
    with pytest.raises(StartError, match="known are max and sum"):
        _load(tmp_path)


def test_sparse_vectors_need_a_head(tmp_path: Path) -> None:
    _save(tmp_path, "Bert", "Model")
    with pytest.raises(StartError, match="need a model with a head that fills masks"):
        _load(tmp_path, pooling="splade")


def _check_sparse(encoder: TextEncoder, model: Any, texts: list[Array], pool: Callable[[Any], Any]) -> None:
    for text, found in zip(texts, encoder.encode([Text(text, wanted="sparse") for text in texts])):
        with torch.inference_mode():
            wanted = pool(torch.log1p(torch.relu(model(torch.tensor(text)[None]).logits[0]))).numpy()
        count = len(found) // 2
        dense = np.zeros(200, np.float32)
        dense[found[:count].view(np.int32)] = found[count:]
        assert np.abs(dense - wanted).max() < 2e-4


def test_places_of_distances_are_transformers() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    rows = torch.zeros(512, 1)
    for buckets, longest in ((256, 512), (16, 300), (-1, 512)):
        places = build_relative_position(rows, rows, buckets, longest)[0].numpy()
        span = buckets if buckets > 0 else longest
        ours = deberta_places(512, buckets, longest)
        assert (ours[::-1][:512] == np.clip(places + span, 0, 2 * span - 1)[::-1][0]).all()
        assert (ours[:512] == np.clip(places + span, 0, 2 * span - 1)[0][::-1]).all()
    table = np.arange(32, dtype=np.float32)[:, None]
    wanted = MPNetEncoder.relative_position_bucket(torch.arange(-511, 512)).numpy()
    assert (mpnet_bias(table, 512)[0] == wanted).all()


@pytest.mark.parametrize("family", ["Electra", "Qwen3"])
def test_a_family_that_runs_through_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    more = {"num_key_value_heads": 1, "head_dim": 16} if family == "Qwen3" else {"embedding_size": 48}
    config = getattr(transformers, f"{family}Config")(**{**_SIZE, "pad_token_id": 1, "num_labels": 1, **more})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path)
    tokens = _texts(1)[0]
    with torch.inference_mode():
        wanted = model(torch.tensor(tokens)[None]).logits[0].numpy()
    encoder = _load(tmp_path)
    assert not isinstance(encoder, EngineEncoder)
    assert np.allclose(encoder.encode([Text(tokens, wanted="scores")])[0], wanted, atol=1e-6)
    with pytest.raises(StartError, match=f"the family '{family.lower()}' is not in it"):
        _load(tmp_path, quantize="int8")


def test_real_weights_give_the_vectors_of_sentence_transformers() -> None:
    """Its steps by hand: the folder's tokenizer, the mean of the states, length 1."""
    folder = real.need("minilm")
    texts = ["What is prefill?", "The quick brown fox jumps over the lazy dog. " * 40, "a", "Ünïcödé, 東京 and more"]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with LLM(folder, threads=2) as llm:
        found = llm.embed(texts)
        assert all((llm.embed([text])[0] == vector).all() for text, vector in zip(texts, found))
    for text, vector in zip(texts, found):
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            wanted = model(**given).last_hidden_state[0].mean(dim=0)
        assert np.abs(vector - (wanted / wanted.norm()).numpy()).max() < 1e-5


def test_batches_are_cut_by_tokens() -> None:
    texts = [Text(np.zeros(length, np.int64)) for length in (3, 4, 9, 1, 30, 2, 2)]
    found = [[len(text.tokens) for text in some] for some in batches(texts, 10)]
    assert found == [[3, 4], [9, 1], [30], [2, 2]]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_attention_heads": 0}, "makes no sense"),
        ({"layer_norm_eps": "x"}, "makes no sense"),
        ({"position_buckets": "many"}, "makes no sense"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
        ({"head_dim": 1 << 40}, "heads of 1099511627776 values"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    """They are told before arrays of such sizes are made."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
        position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    transformers.DebertaV2Model(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **changes}))
    with pytest.raises(StartError, match=text):
        load_encoder(ModelConfig(tmp_path, "cpu", threads=1), open_device("cpu", 0))
