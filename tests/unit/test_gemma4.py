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

from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models.states import Paged, Shared
from tests.engine_checks import (
    check_crowd,
    check_cuts,
    check_gguf,
    check_long_context,
    check_parity,
    check_quantised,
    check_torch,
    load,
    tokens,
)
from tests.gemma4 import FAMILIES, save_gemma4, save_published, write_gemma4
from tests.lm import marks_of
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

BEST = instruction_sets()[:1]
CLOSE = {"e2b": 0.95, "26b": 0.8}
"""Correlation of the logits of 8 bits with those of floats; of few random experts some tokens take others."""

Models = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder and transformers' model of each family."""
    base = tmp_path_factory.mktemp("gemma4")
    return {name: (base / name, save_gemma4(name, base / name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(models: Models, name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_parity(*models[name], tokens(250))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        *(pytest.param(name, isa, marks=marks_of(isa)) for name in ("e2b", "odd") for isa in instruction_sets()),
        *(("26b", isa) for isa in BEST),
    ],
)
def test_any_cut_gives_the_same_bits(models: Models, name: str, isa: str) -> None:
    check_cuts(models[name][0], tokens(90), cpu_isa=isa)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_long_contexts(models: Models, cache: str) -> None:
    """Also over another layer's keys."""
    check_long_context(models["e2b"][0], tokens(700), kv_cache_dtype=cache)


@pytest.mark.parametrize("name", ["e2b", "26b"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(models: Models, name: str, quantize: str) -> None:
    check_quantised(models[name][0], tokens(60), quantize, close=CLOSE[name])


@pytest.mark.parametrize("name", ["e2b", "26b"])
def test_gguf(models: Models, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, floats, blocks = models[name][0], tmp_path / "F32.gguf", tmp_path / "Q8_0.gguf"
    write_gemma4(folder, floats, Type.F32)
    write_gemma4(folder, blocks, Type.Q8_0)
    packed = tmp_path / "packed"
    check_gguf(folder, floats, blocks, tokens(60), close=CLOSE[name], exact=True, packed_cache=packed)
    assert not caplog.records


@pytest.mark.parametrize("name", ["e2b", "26b"])
def test_published_layout(models: Models, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, prompt = models[name][0], tokens(30)
    save_published(folder, tmp_path / "published")
    found = forward(load(tmp_path / "published"), prompt, 0, 0)
    assert np.array_equal(found, forward(load(folder), prompt, 0, 0))
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_layers_embeddings_stay_in_the_file(models: Models, tmp_path: Path, dtype: str) -> None:
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


def test_layers_that_share_have_no_cache(models: Models) -> None:
    model = load(models["e2b"][0])
    states = model.layer_states(16)
    assert [state.layer for state in states if isinstance(state, Shared)] == [3, 2, 3, 2]
    own = [state.block_bytes for state in states if isinstance(state, Paged)]
    assert model.block_bytes(16) == sum(own)
    assert own == [2 * 16 * 2 * size * 4 for size in (32, 32, 48, 32)]


def test_alone_and_in_a_crowd(models: Models) -> None:
    check_crowd(models["e2b"][0], [tokens(count, count) for count in (5, 70, 33)])


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_has_the_same_numbers(models: Models, name: str) -> None:
    check_torch(*models[name], tokens(70), 9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input is 64, below vocab_size 128"),
        ({"use_bidirectional_attention": "all"}, "it is an encoder"),
        ({"layer_types": [*["full_attention"] * 4, *["sliding_attention"] * 4]}, "no layer of type sliding"),
        ({"per_layer_config": {"2": {"head_dim": "wide"}}}, "per_layer_config.*whole numbers by name"),
    ],
)
def test_refusals(models: Models, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    shutil.copytree(models["e2b"][0], tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartError, match=text):
        load(tmp_path / "changed")
