"""gpt-oss on the CPU engine: against transformers, bit for bit against itself, MXFP4 from both layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.errors import StartError
from inflight.kernels import native_reason
from tests.engine_checks import (
    check_crowd,
    check_cuts,
    check_long_context,
    check_parity,
    check_quantised,
    check_torch,
    correlation,
    load,
    logits_of,
    tokens,
)
from tests.gpt_oss import save_gpt_oss, save_mxfp4, write_gpt_oss
from tests.lm import on_sets
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

Models = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder and transformers' model: in floats, and with experts in MXFP4."""
    base = tmp_path_factory.mktemp("gpt_oss")
    floats = save_gpt_oss(base / "floats")
    return {"floats": (base / "floats", floats), "mxfp4": (base / "mxfp4", save_mxfp4(base / "floats", base / "mxfp4"))}


def test_transformers_parity(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    check_parity(*models["floats"], tokens(250))
    assert not caplog.records


def test_sinks_and_clamps_matter(models: Models, tmp_path: Path) -> None:
    """Or the parity above would prove little of them."""
    from safetensors.torch import load_file, save_file

    folder, prompt = models["floats"][0], tokens(60)
    shutil.copytree(folder, tmp_path / "other")
    stored = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor - 9 if name.endswith("sinks") else tensor for name, tensor in stored.items()},
        tmp_path / "other" / "model.safetensors",
    )
    assert np.abs(forward(load(folder), prompt, 0, 0) - forward(load(tmp_path / "other"), prompt, 0, 0)).max() > 0.1


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("name", ["floats", "mxfp4"])
def test_any_cut_gives_the_same_bits(models: Models, name: str, isa: str) -> None:
    check_cuts(models[name][0], tokens(90), cpu_isa=isa)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_long_contexts_merge_with_their_sinks(models: Models, cache: str) -> None:
    check_long_context(models["floats"][0], tokens(700), kv_cache_dtype=cache)


def test_mxfp4(models: Models, tmp_path: Path) -> None:
    """Experts stay at 4 bits. Both layouts are the same numbers, which are transformers' but for inputs of 8 bits."""
    folder, reference = models["mxfp4"]
    prompt = tokens(90)
    model = load(folder, packed_cache=tmp_path / "packed")
    found, wanted = forward(model, prompt, 0, 0), logits_of(reference, prompt)
    assert correlation(found, wanted) > 0.99
    assert model.weight_bytes < 0.5 * load(models["floats"][0]).weight_bytes
    write_gpt_oss(folder, tmp_path / "mxfp4.gguf")
    assert np.array_equal(forward(load(tmp_path / "mxfp4.gguf", dtype="float32"), prompt, 0, 0), found)
    assert np.array_equal(forward(load(folder, packed_cache=tmp_path / "packed"), prompt, 0, 0), found)


def test_gguf(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, prompt = models["floats"][0], tokens(60)
    write_gpt_oss(folder, tmp_path / "floats.gguf")
    found = forward(load(tmp_path / "floats.gguf"), prompt, 0, 0)
    assert np.array_equal(found, forward(load(folder), prompt, 0, 0))
    assert not caplog.records


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(models: Models, quantize: str) -> None:
    check_quantised(models["floats"][0], tokens(60), quantize)


def test_alone_and_in_a_crowd(models: Models) -> None:
    check_crowd(models["mxfp4"][0], [tokens(count, count) for count in (5, 70, 33)])


@pytest.mark.parametrize("name", ["floats", "mxfp4"])
def test_torch_has_the_same_numbers(models: Models, name: str) -> None:
    """To it MXFP4 is floats."""
    check_torch(*models[name], tokens(50), 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit 5.0, where 1.702 and 7.0 are known"),
        ({"intermediate_size": 64}, "experts of shape .* the config wants"),
        ({"num_local_experts": 5}, "has shape"),
    ],
)
def test_refusals(models: Models, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    shutil.copytree(models["mxfp4"][0], tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartError, match=text):
        load(tmp_path / "changed")
