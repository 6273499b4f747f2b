"""Guesses of models with recurrent states, which are taken back to the last right one: no bit changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from inflight.config import DraftConfig
from inflight.contract import Sampling
from inflight.kernels import native_reason
from tests.engine_checks import LOGGED, check_all_as_alone, tokens
from tests.hybrids import FAMILIES, save_hybrid
from tests.lm import Driver, make_runner, save_tiny
from tests.recurrent import EXPERTS, save_recurrent
from tests.unit.test_speculation import MOST, answers, bold

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))
__all__ = ["bold"]

DELTA = {"qwen3_5": ("Qwen3_5", {}), "qwen3_5_moe": ("Qwen3_5Moe", EXPERTS)}
SHORT = ["qwen3_5", "lfm2", "falcon_h1"]
LIMITS = {"guesses": MOST, "mixed_tokens": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family of `SHORT`."""
    base = tmp_path_factory.mktemp("guesses")
    return {name: saved(name, base / name) for name in SHORT}


def saved(name: str, folder: Path) -> Path:
    if name in DELTA:
        family, settings = DELTA[name]
        save_recurrent(family, folder, **settings)
    else:
        save_hybrid(name, folder)
    return folder


def checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn rows, under everything that changes logits, crowded and preempted: as alone without guesses."""
    runner = make_runner(folder)
    assert runner.offer.model.drafts
    plain, none, _, _ = answers(runner, crowd=False)
    assert none == 0
    alone, guessed, right, _ = answers(runner, crowd=False, guesses=MOST)
    assert alone == plain
    assert 5 < right < guessed - 5
    crowd, guessed, right, _ = answers(runner, crowd=True, **LIMITS)
    assert crowd == plain
    assert 5 < right < guessed - 5
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 2)
    *tight, preempted = answers(runner, crowd=True, num_blocks=36, states=6, **LIMITS)
    assert tight[0] == plain
    assert preempted


@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize("name", SHORT)
def test_no_bit_changes(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(folders[name], monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize("name", [name for name in ("qwen3_5_moe", *FAMILIES) if name not in SHORT])
def test_nor_in_other_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(saved(name, tmp_path / "model"), monkeypatch)


@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize("name", SHORT)
def test_chats_and_losses(folders: dict[str, Path], name: str) -> None:
    """Turns that begin with saved states, and rows that are computed again after the rank has died."""
    driver = Driver(make_runner(folders[name]), **LIMITS)
    history, asked = tokens(20) * 3, dict[int, tuple[list[int], int]]()
    for turn in range(3):
        asked[id := driver.add(history, 40, LOGGED)] = (list(history), 40)
        asked[driver.add(tokens(9, turn) * 3, 30, LOGGED)] = (tokens(9, turn) * 3, 30)
        for _ in range(9):
            driver.step()
        if turn == 1:
            driver.scheduler.lost()
            driver.plans.clear()
            driver.runner, driver._first = make_runner(folders[name]), 0
        driver.drain()
        history = [*history, *driver.out[id], *tokens(11, turn + 1)]
    guessed = Counter(right=0, wrong=0)
    for result in driver.results:
        for row, count in result.drafted.items():
            right = result.ids.count(row) - 1
            guessed.update(right=right, wrong=count - right)
    assert guessed["wrong"] > 5
    check_all_as_alone(driver, folders[name], asked)


@pytest.mark.usefixtures("bold")
def test_a_draft_model_guesses_for_one(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without states of its own."""
    monkeypatch.setattr("inflight.shard.draft_model._check_vocabularies", lambda model, draft: None)
    small = save_tiny("Llama", tmp_path / "small", vocab_size=128, num_hidden_layers=1)
    plain, *_ = answers(make_runner(folders["qwen3_5"]), crowd=False)
    runner = make_runner(folders["qwen3_5"], draft_model=DraftConfig(small))
    found, guessed, right, _ = answers(runner, crowd=True, draft_length=512, **LIMITS)
    assert found == plain
    assert guessed > right + 50


def test_without_memory_for_states_nothing_is_guessed(folders: dict[str, Path]) -> None:
    runner = make_runner(folders["qwen3_5"])
    bytes = runner.offer.states.bytes
    few: Any = make_runner(folders["qwen3_5"], kv_cache_bytes=15 * bytes, max_rows=2)
    assert not few.offer.model.drafts
    driver = Driver(few)
    driver.add(tokens(5) * 3, 9, Sampling())
    assert [len(out) for out in driver.drain().values()] == [9]
