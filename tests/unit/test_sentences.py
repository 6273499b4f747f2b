"""sentence-transformers folders: vectors are those that the library gives with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from inflight.checkpoint import Normalize, read_sentence_model
from inflight.errors import InvalidRequest, StartError
from inflight.llm import LLM
from tests import real
from tests.lm import reference
from tests.sentence_folders import LONGEST, RECORDED, TEXTS, VARIANTS, make

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
VECTORS: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_those_of_sentence_transformers(variant: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", variant)
    with LLM(folder, device_type="cpu", threads=1) as llm:
        assert llm.engine.info.limits.max_input_tokens == LONGEST
        for name, wanted in VECTORS[variant].items():
            found = llm.embed(TEXTS, prompt_name=name or None)
            assert np.allclose(found, np.array(wanted), atol=2e-5), name
            alone = np.concatenate([llm.embed(text, prompt_name=name or None) for text in TEXTS])
            assert (alone == found).all(), "bit for bit"
        assert llm.engine.info.unit_vectors == (VARIANTS[variant]["layers"][-1:] == [("Normalize", {})])


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sentences") / "m", "prompts")


@pytest.mark.parametrize("decoder", [False, True])
def test_idle_shards_answer_pulses(prompted: Path, decoder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.engine.loop.PULSE", 0.005)
    with LLM(POCKET if decoder else prompted, device_type="cpu", threads=1, kv_cache_memory=8 << 20) as llm:
        scheduler = llm.engine._lanes.all[0].scheduler
        first = llm.embed(TEXTS[0])
        step, end = scheduler._step, time.monotonic() + 30
        while scheduler._step < step + 5:
            assert time.monotonic() < end, "no pulse"
            time.sleep(0.005)
        assert (llm.embed(TEXTS[0]) == first).all()
        assert scheduler._step > step + 5, "and the same shards answer"


def test_what_a_request_says_of_its_text(prompted: Path) -> None:
    with LLM(prompted, device_type="cpu", threads=1) as llm:
        text = TEXTS[0]
        plain = llm.embed(text, prompt_name="document")  # a prompt that every model has, empty
        assert (llm.embed("search for: " + text, prompt_name="document") == llm.embed(text)).all()
        assert not np.allclose(plain, llm.embed(text))
        ids = [piece.id for piece in llm._call(llm.engine.tokenize(text))]
        assert (llm.embed([ids]) == plain).all(), "token ids are taken as they are, without a prompt"
        long = "dog " * 100
        words = [piece.id for piece in llm._call(llm.engine.tokenize("dog"))]
        first, word, last = words
        assert (llm.embed(long, truncate=6, prompt_name="document") == llm.embed([[first, *[word] * 4, last]])).all()
        assert (llm.embed(long, truncate=True) == llm.embed(long)).all()
        for given, name, text in (
            ({"truncate": False}, None, "must have less than 24 tokens"),
            ({"truncate": 2}, None, "taken by the special ones"),
            ({}, "nobody", "'nobody' is not one of this model's; its prompts are: query, document, passage"),
        ):
            with pytest.raises(InvalidRequest, match=text):
                llm.embed(long, prompt_name=name, **given)
        with pytest.raises(InvalidRequest, match="goes with texts"):
            llm.embed([ids], prompt_name="query")


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "sideways"]}, "pooling .*known are cls, max, mean"),
        ("2_Dense/config.json", {"activation_function": "builtins.exec"}, "'builtins.exec'; known are torch's"),
        ("2_Dense/config.json", {"in_features": 7}, "takes vectors of 7 values, and gets them with 32"),
        ("2_Dense/config.json", {"out_features": 0}, "out_features is 0; it must be"),
        ("2_Dense/config.json", {"out_features": 21}, "has the shape .*its config.json says"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "only sentence_embedding is computed"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "prompts are named query, document"),
        ("config_sentence_transformers.json", {"prompts": {"a": 3}}, "must be texts by name"),
        ("tokenizer_config.json", {"model_max_length": -1}, "it must be a number of tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(file: str, values: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "layers")
    edit(folder / file, **values)
    with pytest.raises(StartError, match=text):
        LLM(folder, device_type="cpu", threads=1)


def test_modules_that_are_not_computed_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "mean")
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    for changed, text in (
        (
            [*modules, {"type": "sentence_transformers.models.CNN", "path": "2_CNN"}],
            "module 'CNN' that is not computed",
        ),
        (modules[:1], "no Pooling module"),
        (modules[1:], "must begin with a Transformer"),
        ([{**modules[0], "path": "0_Transformer"}, modules[1]], "Transformer in '0_Transformer'"),
        ([modules[0], {**modules[1], "path": "../other"}], "outside its folder"),
        ([3], "each is an object"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(StartError, match=text):
            read_sentence_model(folder)


def test_an_enormous_length_is_none(tmp_path: Path) -> None:
    """Tokenizers write 1e30 where they know no limit: the model's own positions are one."""
    folder = make(tmp_path / "m", "mean")
    edit(folder / "tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    found = read_sentence_model(folder)
    assert found is not None
    assert (found.longest, found.cuts, found.layers) == (None, True, ())
    (folder / "modules.json").unlink()
    bare = read_sentence_model(folder)
    assert bare is not None
    assert (bare.poolings, bare.cuts, bare.layers) == (("mean",), False, (Normalize(),))


def test_a_pickled_layer_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "layers")
    file = folder / "2_Dense" / "model.safetensors"
    tensors = load_file(file)
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(StartError, match="is a pickle, which can run code; convert it") as caught:
        LLM(folder, device_type="cpu", threads=1)
    command = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
    exec(command)
    assert all((load_file(file)[name] == value).all() for name, value in tensors.items())
    save_file({"other": np.zeros(1, np.float32)}, file)
    with pytest.raises(StartError, match="has no tensor 'linear"):
        LLM(folder, device_type="cpu", threads=1)


def decoder_folder(folder: Path, pooling: str, normalised: bool) -> Path:
    """A language model's folder with modules, as embedding models of that kind have them."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_bytes((POCKET / name).read_bytes())
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    (folder / "modules.json").write_text(
        json.dumps(
            [{"path": f"{place}_{kind}" if place else "", "type": f"x.{kind}"} for place, kind in enumerate(modules)]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    return folder


@pytest.mark.parametrize(("pooling", "normalised"), [("lasttoken", False), ("mean", True), ("weightedmean", False)])
def test_a_language_models_vectors(pooling: str, normalised: bool, tmp_path: Path) -> None:
    """Whose states come from the engine where one of them or their sum is enough, else from whole texts."""
    folder = decoder_folder(tmp_path / "m", pooling, normalised)
    model = reference(POCKET)
    texts = ["Once upon a time", "a " * 90]
    with LLM(folder, device_type="cpu", dtype="float32", kv_cache_memory=8 << 20) as llm:
        found = llm.embed(texts)
        assert llm.engine.info.generates == (pooling != "weightedmean")
        for text, vector in zip(texts, found):
            ids = [piece.id for piece in llm._call(llm.engine.tokenize(text))]
            with torch.inference_mode():
                states = model.model(torch.tensor([ids])).last_hidden_state[0].numpy()
            weights = {"lasttoken": np.eye(len(ids))[-1], "mean": np.ones(len(ids))}.get(
                pooling, np.arange(len(ids)) + 1
            )
            wanted = weights @ states / weights.sum()
            assert np.allclose(vector, wanted / (np.linalg.norm(wanted) if normalised else 1), atol=1e-4)
        assert llm.embed("a " * 9000).shape == (1, states.shape[1]), "cut to what the model takes"


@pytest.mark.parametrize("kind", ["Gemma3Text", "T5Encoder", "Qwen3"])
def test_models_of_whole_texts(kind: str, tmp_path: Path) -> None:
    """A decoder that reads in both directions, the reading half of a T5, a decoder saved without its head."""
    import transformers

    size: dict[str, Any] = {
        "vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 512,
    }  # fmt: skip
    given = {
        "Gemma3Text": {**size, "use_bidirectional_attention": True, "sliding_window": 9},
        "T5Encoder": {"vocab_size": 2048, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
        "Qwen3": {**size, "tie_word_embeddings": False},
    }[kind]
    folder = decoder_folder(tmp_path / "m", "mean", True)
    torch.manual_seed(0)
    config = getattr(transformers, "T5Config" if kind == "T5Encoder" else f"{kind}Config")(**given)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    texts = ["Once upon a time there was", "a b c " * 20]
    with LLM(folder, device_type="cpu", threads=1) as llm:
        assert not llm.engine.info.generates
        for text, vector in zip(texts, llm.embed(texts)):
            ids = [piece.id for piece in llm._call(llm.engine.tokenize(text))]
            with torch.inference_mode():
                wanted = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy()
            assert np.allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_the_real_minilm_beyond_its_length() -> None:
    """all-MiniLM-L6-v2: 256 tokens of the 512 that its positions would allow, the special ones at both ends."""
    import transformers

    folder = real.need("minilm")
    texts = ["A short text", "The European Union and its member states. " * 60, "日本語のテキスト" * 90]
    model = transformers.AutoModel.from_pretrained(folder, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with LLM(folder, device_type="cpu") as llm:
        found = llm.embed(texts)
    for text, vector in zip(texts, found):
        given = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            wanted = model(**given).last_hidden_state[0].mean(dim=0).numpy()
        assert np.allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-6)
