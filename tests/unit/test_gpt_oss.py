"""gpt-oss on the CPU engine: against transformers, bit for bit against itself, MXFP4 from both layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inflight.config import ModelConfig
from inflight.contract import Sampling
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import native_reason
from inflight.models import load_model
from inflight.models.native import NativeDecoder
from tests.gpt_oss import save_gpt_oss, save_mxfp4, write_gpt_oss
from tests.lm import Driver, make_runner, on_sets
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

LOGGED = Sampling(logprobs=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and transformers' model: in floats, and with experts in MXFP4."""
    base = tmp_path_factory.mktemp("gpt_oss")
    floats = save_gpt_oss(base / "floats")
    return {"floats": (base / "floats", floats), "mxfp4": (base / "mxfp4", save_mxfp4(base / "floats", base / "mxfp4"))}


def load(path: Path, **changes: Any) -> NativeDecoder:
    settings = ModelConfig(path, device_type="cpu", **{"threads": 2, **changes})
    model = load_model(settings, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    model.make_cache(64, 16)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 128, count)]


def logits_of(reference: Any, prompt: list[int]) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = reference(torch.tensor([prompt])).logits[0].numpy()
    return logits


def test_transformers_parity(models: dict[str, tuple[Path, Any]], caplog: pytest.LogCaptureFixture) -> None:
    folder, reference = models["floats"]
    prompt = tokens(250)
    wanted = logits_of(reference, prompt)
    model = load(folder)
    prefill = forward(model, prompt[:200], 0, 0)
    decoded = [forward(model, [token], 200 + index, 0) for index, token in enumerate(prompt[200:])]
    assert np.abs(np.concatenate([prefill, *decoded]) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not caplog.records


def test_sinks_and_clamps_matter(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
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
def test_long_contexts_merge_with_their_sinks(models: dict[str, tuple[Path, Any]], cache: str) -> None:
    """Beyond 512 keys a decoding row's chunks are computed apart."""
    prompt = tokens(700)
    model = load(models["floats"][0], dtype="bfloat16", kv_cache_dtype=cache)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(forward(model, prompt[-1:], 699, 0), whole[-1:])


def test_mxfp4(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Experts stay at 4 bits. Both layouts are the same numbers, which are transformers' but for inputs of 8 bits."""
    folder, reference = models["mxfp4"]
    prompt = tokens(90)
    model = load(folder, packed_cache=tmp_path / "packed")
    found, wanted = forward(model, prompt, 0, 0), logits_of(reference, prompt)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
    assert model.weight_bytes < 0.5 * load(models["floats"][0]).weight_bytes
    write_gpt_oss(folder, tmp_path / "mxfp4.gguf")
    assert np.array_equal(forward(load(tmp_path / "mxfp4.gguf", dtype="float32"), prompt, 0, 0), found)
    assert np.array_equal(forward(load(folder, packed_cache=tmp_path / "packed"), prompt, 0, 0), found)


def test_gguf(models: dict[str, tuple[Path, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, prompt = models["floats"][0], tokens(60)
    write_gpt_oss(folder, tmp_path / "floats.gguf")
    found = forward(load(tmp_path / "floats.gguf"), prompt, 0, 0)
    assert np.array_equal(found, forward(load(folder), prompt, 0, 0))
    assert not caplog.records


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(models: dict[str, tuple[Path, Any]], quantize: str) -> None:
    prompt = tokens(60)
    model = load(models["floats"][0], quantize=quantize)
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 9], at, 1) for at in range(0, 60, 9)]
    assert np.array_equal(np.concatenate(parts), whole)
    floats = forward(load(models["floats"][0]), prompt, 0, 0)
    assert np.corrcoef(whole.ravel(), floats.ravel())[0, 1] > (0.95 if quantize == "int8" else 0.5)


def test_alone_and_in_a_crowd(models: dict[str, tuple[Path, Any]]) -> None:
    def answers(prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        driver = Driver(make_runner(models["mxfp4"][0], kv_cache_bytes=16 << 20))
        ids = [driver.add(prompt, 8, LOGGED) for prompt in prompts]
        driver.drain()
        return [(driver.out[id], driver.logprobs[id]) for id in ids]

    prompts = [tokens(count, count) for count in (5, 70, 33)]
    crowd = answers(prompts)
    assert crowd == [answers([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["floats", "mxfp4"])
def test_torch_has_the_same_numbers(models: dict[str, tuple[Path, Any]], name: str) -> None:
    """The way of several ranks and of devices, to which MXFP4 is floats."""
    folder, reference = models[name]
    prompt = tokens(50)
    driver = Driver(make_runner(folder, cpu_engine="torch", kv_cache_bytes=16 << 20))
    driver.add(prompt, 1, LOGGED)
    driver.drain()
    wanted = torch.log_softmax(torch.from_numpy(logits_of(reference, prompt)[-1]), -1)
    assert driver.out[0][0] == int(wanted.argmax())
    assert abs(driver.logprobs[0][0] - float(wanted.max())) < 1e-3


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit 5.0, where 1.702 and 7.0 are known"),
        ({"intermediate_size": 64}, "experts of shape .* the config wants"),
        ({"num_local_experts": 5}, "has shape"),
    ],
)
def test_refusals(models: dict[str, tuple[Path, Any]], tmp_path: Path, change: dict[str, Any], text: str) -> None:
    shutil.copytree(models["mxfp4"][0], tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartError, match=text):
        load(tmp_path / "changed")
