"""LFM2 and the families with Mamba 2: against transformers, and bit for bit against themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from inflight.checkpoint import open_model
from inflight.contract import Sampling
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models.config import decoder_config
from tests.hybrids import FAMILIES, save_hybrid, write_hybrid
from tests.lm import Driver, make_runner, marks_of
from tests.recurrent import forward
from tests.unit.test_recurrent import check, load, tokens

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

BEST = instruction_sets()[:1]
Models = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder and transformers' model of each family."""
    base = tmp_path_factory.mktemp("hybrids")
    return {name: (base / name, save_hybrid(name, base / name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(models: Models, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, reference = models[name]
    prompt = tokens(230)
    with torch.inference_mode():
        wanted = reference(torch.tensor([prompt])).logits[0].numpy()
    model = load(folder)
    prefill = forward(model, prompt[:200], 0, 0)
    decoded = [forward(model, [token], 200 + index, 0) for index, token in enumerate(prompt[200:])]
    assert np.abs(np.concatenate([prefill, *decoded]) - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        *(
            pytest.param(name, isa, marks=marks_of(isa))
            for name in ("lfm2 odd", "granite odd")
            for isa in instruction_sets()
        ),
        *((name, isa) for name in ("falcon_h1 norm", "nemotron_h", "lfm2_moe") for isa in BEST),
    ],
)
def test_any_cut_gives_the_same_bits(models: Models, name: str, isa: str) -> None:
    prompt = tokens(90)
    model = load(models[name][0], cpu_isa=isa, dtype="bfloat16")
    whole = forward(model, prompt, 0, 0)
    for cut in (1, 7, 50):
        parts = [forward(model, prompt[at : at + cut], at, 1) for at in range(0, len(prompt), cut)]
        assert np.array_equal(np.concatenate(parts), whole), cut
    one = load(models[name][0], cpu_isa=isa, dtype="bfloat16", threads=1)
    assert np.array_equal(forward(one, prompt, 0, 3, saves=[(32, 1), (49, 2)]), whole)
    one.copy_state(1, 0)
    assert np.array_equal(forward(one, prompt[32:], 32, 0), whole[32:])
    assert np.array_equal(forward(one, prompt[49:], 49, 2), whole[49:])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["lfm2_moe", "granite_moe", "falcon_h1", "nemotron_h"])
def test_quantised(models: Models, name: str, quantize: str, tmp_path: Path) -> None:
    """The products lose digits, the recurrences do not: the same bits for any cut, and from packed weights."""
    prompt = tokens(60)
    model = load(models[name][0], quantize=quantize, packed_cache=tmp_path)
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 9], at, 1) for at in range(0, 60, 9)]
    assert np.array_equal(np.concatenate(parts), whole)
    floats = forward(load(models[name][0]), prompt, 0, 0)
    assert np.corrcoef(whole.ravel(), floats.ravel())[0, 1] > (0.95 if quantize == "int8" else 0.5)
    packed = load(models[name][0], quantize=quantize, packed_cache=tmp_path)
    assert np.array_equal(forward(packed, prompt, 0, 0), whole)


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "granite", "granite_moe", "falcon_h1", "nemotron_h moe"])
def test_gguf(models: Models, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Floats give the checkpoint's logits, blocks the same bits for any cut."""
    prompt = tokens(60)
    for kind in (Type.F32, Type.Q8_0):
        write_hybrid(models[name][0], tmp_path / f"{kind.name}.gguf", kind)
    wanted = forward(load(models[name][0]), prompt, 0, 0)
    found = forward(load(tmp_path / "F32.gguf", dtype="float32"), prompt, 0, 0)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    model = load(tmp_path / "Q8_0.gguf")
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 7], at, 1) for at in range(0, 60, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.corrcoef(whole.ravel(), wanted.ravel())[0, 1] > 0.95
    assert not caplog.records


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_chats_preemption_and_replay(models: Models, name: str) -> None:
    """In a crowd, with more requests than states, from the cache and after a loss: every request as it is alone."""
    folder = models[name][0]
    driver = Driver(make_runner(folder), states=5, num_blocks=40)
    asked: dict[int, tuple[list[int], int]] = {}
    history = tokens(50)
    for number in range(4):
        asked[driver.add(list(history), 20, Sampling(logprobs=True))] = (list(history), 20)
        prompt = tokens(17 + 5 * number, number)
        asked[driver.add(prompt, 12, Sampling(logprobs=True))] = (prompt, 12)
    for _ in range(9):
        driver.step()
    driver.scheduler.lost()
    driver.plans.clear()
    driver.runner, driver._first = make_runner(folder), 0
    driver.drain()
    turn = [*history, *driver.out[min(asked)], *tokens(11, 9)]
    again = driver.add(turn, 9, Sampling(logprobs=True))
    sequence = driver.scheduler.requests[again]
    driver.drain()
    asked[again] = (turn, 9)
    assert (sequence.cached or 0) > 0
    check(driver, folder, asked)


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("nemotron_h", {"moe_latent_size": 16}, "moe_latent_size"),
        ("granite", {"hidden_act": "gelu"}, "hidden_act"),
        ("granite", {"layer_types": ["linear_attention"] * 4}, "no layer has attention"),
        ("granite", {"layer_types": ["mamba", "sparse"] * 2}, "sparse"),
        ("granite", {"mamba_n_groups": 3}, "8 heads of 16 in 3 groups"),
        ("granite", {"mamba_d_conv": 9}, "9 taps"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ("falcon_h1", {"key_multiplier": "much"}, "key_multiplier"),
        ("falcon_h1", {"mamba_d_ssm": 100}, "do not make 100"),
        ("falcon_h1", {"head_dim": 1 << 30}, "heads of 1073741824 values"),
        ("falcon_h1", {"vocab_size": None}, "vocab_size is None"),
        ("granite", {"shared_intermediate_size": "x"}, "intermediate_size is 'x'"),
        ("granite", {"logits_scaling": 0}, "scaling is 0"),
        ("nemotron_h", {"layer_norm_epsilon": "small"}, "epsilon is 'small'"),
        ("nemotron_h", {"n_group": 0}, "n_group"),
        ("nemotron_h", {"num_attention_heads": 1 << 30}, "1073741824 heads"),
        ("nemotron_h", {"moe_intermediate_size": None}, "experts' intermediate size is None"),
    ],
)
def test_refused_settings_are_named(models: Models, name: str, changes: dict[str, Any], text: str) -> None:
    config = {**json.loads((models[name][0] / "config.json").read_text()), **changes}
    with pytest.raises(StartError, match=text):
        decoder_config(config)


def test_granites_rows_stand_as_in_its_checkpoint(models: Models, tmp_path: Path) -> None:
    """Its scores do not depend on their order, but an adapter's rows are in that of the checkpoint."""
    write_hybrid(models["granite"][0], tmp_path / "tiny.gguf", Type.F32)
    config = decoder_config(json.loads((models["granite"][0] / "config.json").read_text()))
    found: list[list[Any]] = []
    assert config is not None
    layer = next(each for each in range(config.layers) if config.attends(each))
    rows = {"q": config.heads * config.head_dim, "k": config.kv_heads * config.head_dim}
    for path in (models["granite"][0], tmp_path / "tiny.gguf"):
        with open_model(path).weights() as weights:
            read = [
                weights.read(f"model.layers.{layer}.self_attn.{key}_proj.weight", (count, config.hidden))
                for key, count in rows.items()
            ]
            found.append([np.array(each) for each in read])
    assert all(np.array_equal(first, second) for first, second in zip(*found))


def test_older_configs() -> None:
    """Settings by the names of the first releases."""
    lfm2 = {
        "model_type": "lfm2",
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "block_ff_dim": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "full_attn_idxs": [1],
        "tie_embedding": False,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    found = decoder_config(lfm2)
    assert found is not None
    assert (found.intermediate, found.tied, found.recurrence and found.recurrence.layers) == (
        256,
        False,
        (True, False, True),
    )
    nemotron = {
        "model_type": "nemotron_h",
        "vocab_size": 128,
        "hidden_size": 64,
        "hybrid_override_pattern": "M*-",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "num_hidden_layers": 3,
    }
    found = decoder_config(nemotron)
    assert found is not None
    assert [found.attends(layer) for layer in range(3)] == [False, True, False]
    assert [found.has_mlp(layer) for layer in range(3)] == [False, False, True]
