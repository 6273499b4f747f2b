"""Families with recurrent layers: against transformers, bit for bit against themselves, and their states in the
scheduler's hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from inflight.contract import Sampling
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models import config
from inflight.sched import Capacity, Scheduler, Sequence
from inflight.sched.states import StatePool
from tests.engine_checks import (
    LOGGED,
    check_all_as_alone,
    check_cuts,
    check_gguf,
    check_parity,
    check_quantised,
    load,
    tokens,
)
from tests.lm import Driver, make_runner, marks_of
from tests.recurrent import EXPERTS, forward, save_recurrent, save_stacked, write_qwen35

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

ODD = {"linear_key_head_dim": 18, "linear_value_head_dim": 20, "linear_conv_kernel_dim": 3, "attention_bias": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", {}),
    "odd sizes": ("Qwen3_5", {**ODD, "linear_num_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3_next": ("Qwen3Next", EXPERTS),
    "qwen3_5_moe": ("Qwen3_5Moe", EXPERTS),
}
Models = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folder and transformers' model of each family."""
    base = tmp_path_factory.mktemp("recurrent")
    return {
        name: (base / name, save_recurrent(family, base / name, **settings))
        for name, (family, settings) in FAMILIES.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(models: Models, name: str) -> None:
    check_parity(*models[name], tokens(250))


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        *(pytest.param("odd sizes", isa, marks=marks_of(isa)) for isa in instruction_sets()),
        *(("qwen3_5_moe", isa) for isa in instruction_sets()[:1]),
    ],
)
def test_any_cut_gives_the_same_bits(models: Models, name: str, isa: str) -> None:
    check_cuts(models[name][0], tokens(90), saved=(32, 48), cpu_isa=isa)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised(models: Models, quantize: str) -> None:
    """The products lose digits, the recurrences do not."""
    check_quantised(models["qwen3_5_moe"][0], tokens(60), quantize)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_gguf(models: Models, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The block behind the last one is left."""
    folder, floats, blocks = models[name][0], tmp_path / "F32.gguf", tmp_path / "Q8_0.gguf"
    write_qwen35(folder, floats, Type.F32)
    write_qwen35(folder, blocks, Type.Q8_0)
    check_gguf(folder, floats, blocks, tokens(60))
    assert not caplog.records


def test_published_layout_of_experts(models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, prompt = models["qwen3_5_moe"][0], tokens(30)
    save_stacked(folder, tmp_path / "stacked")
    model = load(tmp_path / "stacked", packed_cache=tmp_path / "packed")
    wanted = forward(load(folder), prompt, 0, 0)
    assert np.array_equal(forward(model, prompt, 0, 0), wanted)
    assert not caplog.records
    assert len(list((tmp_path / "packed").iterdir())) == 1
    assert np.array_equal(forward(load(tmp_path / "stacked", packed_cache=tmp_path / "packed"), prompt, 0, 0), wanted)


def test_a_long_text_stays_finite(models: Models) -> None:
    """Decays near 0 and near 1: the state neither grows nor vanishes into what is not a number."""
    folder, reference = models["qwen3_5"]
    runner = make_runner(folder, kv_cache_bytes=64 << 20, max_step_tokens=600)
    driver = Driver(runner, max_step_tokens=600, max_prefill_tokens=512)
    prompt = tokens(2000)
    driver.add(prompt, 2, LOGGED)
    driver.drain()
    with torch.inference_mode():
        logits = torch.log_softmax(reference(torch.tensor([prompt])).logits[0, -1], -1)
    assert abs(driver.logprobs[0][0] - float(logits.max())) < 1e-3


# In the scheduler


def test_chat_goes_on_from_saved_states(models: Models) -> None:
    folder = models["qwen3_5"][0]
    driver = Driver(make_runner(folder))
    history, asked = tokens(90), {}
    for turn in range(3):
        id = driver.add(history, 40, LOGGED)
        asked[id] = (list(history), 40)
        sequence = driver.scheduler.requests[id]
        driver.drain()
        # All but the last blocks: behind the prompt's end, and at most 32 tokens behind the answer's end.
        assert turn == 0 or (sequence.cached or 0) > len(history) - 15 - 40, turn
        history = [*history, *driver.out[id], *tokens(11, turn + 1)]
    check_all_as_alone(driver, folder, asked)


def test_a_shared_beginning_is_found_at_the_third_use(models: Models) -> None:
    folder = models["qwen3_5"][0]
    driver = Driver(make_runner(folder))
    system, cached, asked = tokens(50), [], {}
    for turn in range(3):
        prompt = [*system, *tokens(30, turn + 1)]
        id = driver.add(prompt, 5, LOGGED)
        asked[id] = (prompt, 5)
        sequence = driver.scheduler.requests[id]
        driver.drain()
        cached.append(sequence.cached)
    assert cached == [0, 0, 48]
    id = driver.add([*system, *tokens(30, 3)], 5, LOGGED, tenant="another")
    sequence = driver.scheduler.requests[id]
    driver.drain()
    assert sequence.cached == 0
    check_all_as_alone(driver, folder, asked)


@pytest.mark.parametrize("states", [2, 5])
def test_more_requests_than_states(models: Models, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for one; blocks are short too, so that rows are preempted and computed anew."""
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 1)
    folder = models["qwen3_5"][0]
    driver = Driver(make_runner(folder), states=states, num_blocks=34)
    asked = {}
    for number in range(9):
        prompt = [*tokens(10 + number % 3 * 8), *tokens(9, number)]
        asked[driver.add(prompt, 20 + number, LOGGED, tenant=str(number % 2))] = (prompt, 20 + number)
    driver.drain()
    assert driver.scheduler.preemptions or states == 2
    check_all_as_alone(driver, folder, asked)


def test_replay_after_a_loss(models: Models) -> None:
    folder = models["qwen3_5"][0]
    driver = Driver(make_runner(folder))
    asked = {driver.add(tokens(40, seed), 30, LOGGED): (tokens(40, seed), 30) for seed in range(3)}
    for _ in range(12):
        driver.step()
    driver.scheduler.lost()
    driver.plans.clear()
    driver.runner, driver._first = make_runner(folder), 0
    driver.drain()
    check_all_as_alone(driver, folder, asked)


def test_cancelled_requests_free_their_states() -> None:
    scheduler = Scheduler(Capacity(64, 4, 8, 80, 64, states=6, align=64))
    for id in range(4):
        scheduler.add(Sequence(id, list(range(9)), Sampling(), 20))
    assert scheduler.plan() is not None
    assert scheduler.states.pool.used > 0
    for id in range(4):
        scheduler.finish(id)
    scheduler.plan()
    assert scheduler.states.pool.used == scheduler.states.pool.saved


def test_state_pool() -> None:
    pool = StatePool(2)
    first, second = pool.take(), pool.take()
    assert (first, second, pool.take()) == (0, 1, None)
    pool.publish(0, b"a")
    pool.publish(1, b"b")
    assert pool.longest([b"a", b"x", b"b", b"y"]) == 3
    assert pool.use(b"a") == 0
    assert pool.take() == 1  # b was used longer ago
    assert (b"b" in pool, b"a" in pool) == (False, True)
    pool.publish(1, b"a")  # one is enough
    assert pool.take() == 1
    pool.forget(b"a")
    assert pool.take() == 0


def test_documentation_names_the_families() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    assert f"`{'`, `'.join(config.FAMILIES)}`" in " ".join(page.split())


def test_unknown_architectures_are_told_which_are_known(tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "mamba"
    tiny = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(tiny).save_pretrained(folder)
    with pytest.raises(StartError, match=r"'mamba' cannot be served.*; the families that .* are llama, .*qwen3_5"):
        load(folder)


def test_other_ways_say_why_not(models: Models) -> None:
    with pytest.raises(StartError, match=r"'qwen3_5_text' run on the CPU engine only.*cpu_engine is torch"):
        load(models["qwen3_5"][0], cpu_engine="torch")
