"""LFM2 and the families with Mamba 2: against transformers, and bit for bit against themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from inflight.checkpoint import open_model
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models.config import decoder_config
from tests.engine_checks import (
    LOGGED,
    check_all_as_alone,
    check_cuts,
    check_gguf,
    check_parity,
    check_quantised,
    tokens,
)
from tests.hybrids import FAMILIES, save_hybrid, write_hybrid
from tests.lm import Driver, make_runner, marks_of

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
    check_parity(*models[name], tokens(230), decoded=30)
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
    check_cuts(models[name][0], tokens(90), saved=(32, 49), cpu_isa=isa)


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("lfm2_moe", "int8"),
        ("granite_moe", "int4"),
        ("falcon_h1", "int8"),
        ("falcon_h1", "int4"),
        ("nemotron_h", "int4"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("lfm2_moe", "int4"), ("granite_moe", "int8"), ("nemotron_h", "int8"))
        ),
    ],
)
def test_quantised(models: Models, name: str, quantize: str, tmp_path: Path) -> None:
    """The products lose digits, the recurrences do not."""
    check_quantised(models[name][0], tokens(60), quantize, packed_cache=tmp_path)


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "granite", "granite_moe", "falcon_h1", "nemotron_h moe"])
def test_gguf(models: Models, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, floats, blocks = models[name][0], tmp_path / "F32.gguf", tmp_path / "Q8_0.gguf"
    write_hybrid(folder, floats, Type.F32)
    write_hybrid(folder, blocks, Type.Q8_0)
    check_gguf(folder, floats, blocks, tokens(60))
    assert not caplog.records


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_chats_preemption_and_replay(models: Models, name: str) -> None:
    """In a crowd, with more requests than states, from the cache and after a loss: every request as it is alone."""
    folder = models[name][0]
    driver = Driver(make_runner(folder), states=5, num_blocks=40)
    asked: dict[int, tuple[list[int], int]] = {}
    history = tokens(50)
    for number in range(4):
        asked[driver.add(list(history), 20, LOGGED)] = (list(history), 20)
        prompt = tokens(17 + 5 * number, number)
        asked[driver.add(prompt, 12, LOGGED)] = (prompt, 12)
    for _ in range(9):
        driver.step()
    driver.scheduler.lost()
    driver.plans.clear()
    driver.runner, driver._first = make_runner(folder), 0
    driver.drain()
    turn = [*history, *driver.out[min(asked)], *tokens(11, 9)]
    again = driver.add(turn, 9, LOGGED)
    sequence = driver.scheduler.requests[again]
    driver.drain()
    asked[again] = (turn, 9)
    assert (sequence.cached or 0) > 0
    check_all_as_alone(driver, folder, asked)


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
        (
            "falcon_h1",
            {"attention_bias": True, "attention_in_multiplier": 0.5},
            "'attention_bias' beside 'attention_in_multiplier'",
        ),
        (
            "falcon_h1",
            {"mamba_proj_bias": True, "ssm_in_multiplier": 2.0},
            "'mamba_proj_bias' beside 'ssm_in_multiplier'",
        ),
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
