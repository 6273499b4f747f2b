"""Gemma 4 on the CPU engine: against transformers, bit for bit against itself, from both layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from inflight.config import ModelConfig
from inflight.contract import Sampling
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models import load_model
from inflight.models.native import NativeDecoder
from inflight.models.states import Paged, Shared
from tests.gemma4 import FAMILIES, save_gemma4, save_published, write_gemma4
from tests.lm import Driver, make_runner, marks_of
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

LOGGED = Sampling(logprobs=True)
BEST = instruction_sets()[:1]
CLOSE = {"e2b": 0.95, "26b": 0.8}
"""Correlation of the logits of 8 bits with those of floats; of few random experts some tokens take others."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and transformers' model of each family."""
    base = tmp_path_factory.mktemp("gemma4")
    return {name: (base / name, save_gemma4(name, base / name)) for name in FAMILIES}


def load(path: Path, **changes: Any) -> NativeDecoder:
    settings = ModelConfig(path, device_type="cpu", **{"threads": 2, **changes})
    model = load_model(settings, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    model.make_cache(64, 16)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 128, count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(models: dict[str, tuple[Path, Any]], name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, reference = models[name]
    prompt = tokens(250)
    with torch.inference_mode():
        wanted = reference(torch.tensor([prompt])).logits[0].numpy()
    model = load(folder)
    prefill = forward(model, prompt[:200], 0, 0)
    decoded = [forward(model, [token], 200 + index, 0) for index, token in enumerate(prompt[200:])]
    assert np.abs(np.concatenate([prefill, *decoded]) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        *(pytest.param("e2b", isa, marks=marks_of(isa)) for isa in instruction_sets()),
        ("odd", instruction_sets()[-1]),
        *(("26b", isa) for isa in BEST),
    ],
)
def test_any_cut_gives_the_same_bits(models: dict[str, tuple[Path, Any]], name: str, isa: str) -> None:
    prompt = tokens(90)
    model = load(models[name][0], cpu_isa=isa, dtype="bfloat16")
    whole = forward(model, prompt, 0, 0)
    for cut in (1, 7, 50):
        parts = [forward(model, prompt[at : at + cut], at, 1) for at in range(0, len(prompt), cut)]
        assert np.array_equal(np.concatenate(parts), whole), cut
    one = load(models[name][0], cpu_isa=isa, dtype="bfloat16", threads=1)
    assert np.array_equal(forward(one, prompt, 0, 3), whole)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_long_contexts(models: dict[str, tuple[Path, Any]], cache: str) -> None:
    """Beyond 512 keys a decoding row's chunks are computed apart, also over another layer's keys."""
    prompt = tokens(700)
    model = load(models["e2b"][0], dtype="bfloat16", kv_cache_dtype=cache)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(forward(model, prompt[-1:], 699, 0), whole[-1:])


@pytest.mark.parametrize("name", ["e2b", "26b"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(models: dict[str, tuple[Path, Any]], name: str, quantize: str) -> None:
    prompt = tokens(60)
    model = load(models[name][0], quantize=quantize)
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 9], at, 1) for at in range(0, 60, 9)]
    assert np.array_equal(np.concatenate(parts), whole)
    floats = forward(load(models[name][0]), prompt, 0, 0)
    assert np.corrcoef(whole.ravel(), floats.ravel())[0, 1] > (CLOSE[name] if quantize == "int8" else 0.5)


@pytest.mark.parametrize("name", ["e2b", "26b"])
def test_gguf(models: dict[str, tuple[Path, Any]], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Floats give the checkpoint's bits, blocks the same bits for any cut and from the packed file."""
    prompt = tokens(60)
    for kind in (Type.F32, Type.Q8_0):
        write_gemma4(models[name][0], tmp_path / f"{kind.name}.gguf", kind)
    wanted = forward(load(models[name][0]), prompt, 0, 0)
    assert np.array_equal(forward(load(tmp_path / "F32.gguf"), prompt, 0, 0), wanted)
    model = load(tmp_path / "Q8_0.gguf", packed_cache=tmp_path / "packed")
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 7], at, 1) for at in range(0, 60, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.corrcoef(whole.ravel(), wanted.ravel())[0, 1] > CLOSE[name]
    kept = load(tmp_path / "Q8_0.gguf", packed_cache=tmp_path / "packed")
    assert np.array_equal(forward(kept, prompt, 0, 0), whole)
    assert not caplog.records


@pytest.mark.parametrize("name", ["e2b", "26b"])
def test_published_layout(
    models: dict[str, tuple[Path, Any]], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompt = models[name][0], tokens(30)
    save_published(folder, tmp_path / "published")
    found = forward(load(tmp_path / "published"), prompt, 0, 0)
    assert np.array_equal(found, forward(load(folder), prompt, 0, 0))
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_layers_embeddings_stay_in_the_file(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, dtype: str
) -> None:
    """Whatever the type of floats; they are no memory of the process's own."""
    from safetensors.torch import load_file, save_file

    folder, prompt = models["e2b"][0], tokens(30)
    shutil.copytree(folder, tmp_path / "stored")
    stored = load_file(folder / "model.safetensors")
    table = "model.embed_tokens_per_layer.weight"
    stored[table] = stored[table].to(getattr(torch, dtype))
    save_file(stored, tmp_path / "stored" / "model.safetensors")
    model = load(tmp_path / "stored", dtype="float32")
    [mapped] = model._program._tables
    assert not mapped.data.flags.owndata
    assert not mapped.data.flags.writeable
    found = forward(model, prompt, 0, 0)
    save_file({**stored, table: stored[table].float()}, tmp_path / "float32.safetensors")
    shutil.copytree(folder, tmp_path / "widened")
    (tmp_path / "float32.safetensors").replace(tmp_path / "widened" / "model.safetensors")
    assert np.array_equal(found, forward(load(tmp_path / "widened"), prompt, 0, 0))


def test_layers_that_share_have_no_cache(models: dict[str, tuple[Path, Any]]) -> None:
    model = load(models["e2b"][0])
    states = model.layer_states(16)
    assert [state.layer for state in states if isinstance(state, Shared)] == [3, 2, 3, 2]
    own = [state.block_bytes for state in states if isinstance(state, Paged)]
    assert model.block_bytes(16) == sum(own)
    assert own == [2 * 16 * 2 * size * 4 for size in (32, 32, 48, 32)]


def test_alone_and_in_a_crowd(models: dict[str, tuple[Path, Any]]) -> None:
    def answers(prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        driver = Driver(make_runner(models["e2b"][0], kv_cache_bytes=16 << 20))
        ids = [driver.add(prompt, 8, LOGGED) for prompt in prompts]
        driver.drain()
        return [(driver.out[id], driver.logprobs[id]) for id in ids]

    prompts = [tokens(count, count) for count in (5, 70, 33)]
    crowd = answers(prompts)
    assert crowd == [answers([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_has_the_same_numbers(models: dict[str, tuple[Path, Any]], name: str) -> None:
    """The way of several ranks and of devices."""
    folder, reference = models[name]
    prompt = tokens(70)
    driver = Driver(make_runner(folder, cpu_engine="torch", kv_cache_bytes=16 << 20))
    driver.add(prompt, 9, LOGGED)
    driver.drain()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + driver.out[0]])).logits[0, 69:-1]
    wanted = torch.log_softmax(logits, -1)
    assert driver.out[0] == wanted.argmax(-1).tolist()
    assert np.abs(np.array(driver.logprobs[0]) - wanted.max(-1).values.numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input is 64, below vocab_size 128"),
        ({"use_bidirectional_attention": "all"}, "it is an encoder"),
        ({"layer_types": [*["full_attention"] * 4, *["sliding_attention"] * 4]}, "no layer of type sliding"),
        ({"per_layer_config": {"2": {"head_dim": "wide"}}}, "per_layer_config.*whole numbers by name"),
    ],
)
def test_refusals(models: dict[str, tuple[Path, Any]], tmp_path: Path, change: dict[str, Any], text: str) -> None:
    shutil.copytree(models["e2b"][0], tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartError, match=text):
        load(tmp_path / "changed")
