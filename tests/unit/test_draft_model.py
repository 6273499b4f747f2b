"""A draft model: it changes no answer, and one that equals the model is never wrong, whatever befalls its cache."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from inflight.config import AdapterConfig, DraftConfig, GeneratorConfig, ModelConfig
from inflight.contract import Sampling, StepPlan, StepResult
from inflight.errors import ConfigError, StartError
from inflight.kernels import native_reason
from inflight.llm import LLM, Generation
from inflight.sched import Capacity, Sequence, Speculation
from inflight.sched.cache import Cache
from inflight.sched.guesses import Bars, Guesses
from inflight.sched.queues import Queues
from inflight.shard import ModelRunner
from inflight.text import json_grammar
from tests.lm import POCKET, Driver, make_runner, save_tiny
from tests.recurrent import save_recurrent
from tests.unit.test_lora import save_adapter
from tests.unit.test_speculation import SCHEMA, answers, bold

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))
__all__ = ["bold"]

MOST = 5


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with pocket's vocabulary, which is wrong nearly always."""
    folder = save_tiny("Llama", tmp_path_factory.mktemp("draft") / "stranger", vocab_size=2048, num_hidden_layers=1)
    shutil.copy(POCKET / "tokenizer.json", folder)
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps of all runners, what their draft models have guessed, and how much of it was right."""
    found, run = Counter[str](), ModelRunner.run

    def counted(runner: ModelRunner, plan: StepPlan) -> StepResult | None:
        result = run(runner, plan)
        assert result is not None
        found["steps"] += 1
        for id in result.modelled:
            found["guessed"] += result.drafted[id]
            found["right"] += max(0, result.ids.count(id) - 1)
        return result

    monkeypatch.setattr(ModelRunner, "run", counted)
    return found


def drafted(path: Path, **settings: Any) -> ModelRunner:
    return make_runner(POCKET, draft_model=DraftConfig(path), **settings)


@pytest.mark.usefixtures("bold")
def test_no_bit_changes(stranger: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, log-probabilities and the most likely ones, greedy and drawn, under everything that changes logits: in a
    crowd, and preempted, as alone without guesses. An equal draft is never wrong."""
    limits = {"guesses": MOST, "draft_length": 512, "mixed_tokens": 64}
    plain, *_ = answers(make_runner(POCKET), crowd=False)
    assert answers(drafted(stranger), crowd=True, **limits)[0] == plain
    assert counts["right"] < counts["guessed"] / 4
    counts.clear()
    runner = drafted(POCKET)
    assert answers(runner, crowd=True, **limits)[0] == plain
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 2)
    *tight, preempted = answers(runner, crowd=True, num_blocks=36, **limits)
    assert tight[0] == plain
    assert preempted
    assert counts["right"] == counts["guessed"] > 200


@pytest.mark.usefixtures("bold")
def test_what_was_cached_before_is_computed_when_it_is_needed(counts: Counter[str]) -> None:
    """Long prompts in chunks, prefixes that other rows left, which the draft model has read or not, and rows that guess
    late: an equal draft is never wrong, and reads at most so many tokens a step."""
    runner = drafted(POCKET, kv_cache_bytes=32 << 20)
    long = [3 + (7 * place) % 2000 for place in range(600)]
    asked = [(long, 9), (long[:400], 30), ([5], 20), (long + [9, 8], 12), (long[:400] + [7], 3)]
    answered = []
    for guesses in (0, MOST, MOST):
        driver = Driver(runner, guesses=guesses, draft_length=1000, mixed_tokens=64)
        for prompt, count in asked:
            driver.add(prompt, count, Sampling(do_sample=True, seed=count))
            driver.step()
        answered.append(list(driver.drain().values()))
        for id in list(runner._batch.ids):
            runner._batch.filter(id)
        assert (counts["guessed"] > 0) == (guesses > 0)
    assert answered[0] == answered[1] == answered[2]
    assert counts["right"] == counts["guessed"] > 30
    caught_up = [result.caught_up for result in driver.results]
    assert max(caught_up) > 64, "no row began behind a prompt that only the model had read"
    assert 0 in caught_up


@pytest.mark.usefixtures("bold")
def test_rows_with_adapters_are_guessed_for(counts: Counter[str], tmp_path: Path) -> None:
    """By the draft model without them: rows of two adapters and of none in one batch get their own tokens."""
    adapters = tuple(AdapterConfig(name, save_adapter(POCKET, tmp_path / name, n)) for n, name in enumerate(("a", "b")))
    answered = []
    for settings in ({}, {"draft_model": DraftConfig(POCKET)}):
        runner = make_runner(POCKET, adapters=adapters, kv_cache_bytes=16 << 20, **settings)
        driver = Driver(runner, guesses=MOST, draft_length=runner.offer.draft_length, mixed_tokens=64)
        for number in range(6):
            sampling = Sampling(do_sample=number > 2, seed=number, logprobs=True)
            driver.add([9, 40 + number], 24, sampling, adapter=number % 3)
        answered.append([list(driver.drain().values()), driver.logprobs])
        assert (counts["guessed"] > 50) == bool(settings)
    assert answered[0] == answered[1]
    assert len({tuple(tokens) for tokens in answered[0][0]}) == 6


def test_its_cache_is_counted(stranger: Path) -> None:
    alone, both = make_runner(POCKET).offer.cache, drafted(stranger).offer.cache
    assert both.num_blocks < alone.num_blocks
    assert alone.bytes / alone.num_blocks < both.bytes / both.num_blocks
    assert both.bytes < 1.1 * alone.bytes


def written(lose: int | None, **settings: Any) -> list[Generation]:
    """Texts under grammars and free ones, all at once. Args: lose: the step at which the rank dies."""
    run, left = ModelRunner.run, [lose]

    def dying(runner: ModelRunner, plan: StepPlan) -> StepResult | None:
        if plan.step == left[0]:
            left[0] = None
            raise RuntimeError("the rank dies")
        return run(runner, plan)

    samplings = [Sampling(do_sample=number % 2 == 1, seed=number, logprobs=True) for number in range(5)]
    grammars = [json_grammar(SCHEMA) if number == 2 else None for number in range(5)]
    with pytest.MonkeyPatch.context() as patch, LLM(POCKET, kv_cache_memory=8 << 20, **settings) as llm:
        patch.setattr(ModelRunner, "run", dying)
        return llm.generate(["Once upon a time"] * 5, samplings, max_new_tokens=40, grammar=grammars)


@pytest.mark.usefixtures("bold")
def test_a_rank_that_dies_changes_nothing(counts: Counter[str]) -> None:
    plain = written(None, speculate=0)
    assert counts["guessed"] == 0
    assert written(8, draft_model=POCKET, speculate=MOST) == plain
    assert counts["right"] == counts["guessed"] > 50


def policy() -> tuple[Guesses, Sequence]:
    """The guesses of one row, and what a step of it takes."""
    guesses = Guesses(Cache(Capacity(100, 4, 8, 100, 100, 32, guesses=8, draft_length=200)))
    guesses._text.took(1, 0, 1.0)
    row = Sequence(0, [1] * 8, Sampling(), 99)
    row.planned = len(row.tokens)
    row.tokens.append(1)
    return guesses, row


def test_a_row_asks_whoever_promises_more() -> None:
    guesses, row = policy()
    text, model = guesses._wanted(row, guesses.bars([row], Queues()))
    assert text > 0, "a guess that costs nothing"
    assert model > 0, "where the text has none"
    for _ in range(20):
        guesses._model.tried(row, 4, 4)
        guesses._text.tried(row.experience, 4, 0)
    assert guesses._wanted(row, guesses.bars([row], Queues())) == (0, 8)
    for _ in range(30):
        guesses._model.tried(row, 4, 0)
        guesses._text.tried(row.experience, 4, 4)
    assert guesses._wanted(row, guesses.bars([row], Queues())) == (8, 0)


def test_a_draft_model_that_cannot_guess_is_refused(stranger: Path, tmp_path: Path) -> None:
    """By one sentence that says why."""
    other = tmp_path / "other"
    shutil.copytree(stranger, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values())))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StartError, match=r"its vocabulary is another one than that of 'pocket': token .* differ"):
        drafted(other)
    save_recurrent("Qwen3_5", tmp_path / "recurrent")
    with pytest.raises(StartError, match="has no recurrent states"):
        drafted(tmp_path / "recurrent")
    with pytest.raises(StartError, match="on the CPU engine only"):
        drafted(POCKET, cpu_engine="torch")
    with pytest.raises(StartError, match=r"--draft-model '.*nothing': "):
        drafted(tmp_path / "nothing")


def test_a_draft_model_that_may_not_guess_is_refused() -> None:
    with pytest.raises(ConfigError, match="--speculate 0 forbids it"):
        GeneratorConfig.of(POCKET, "m", draft_model=DraftConfig(POCKET), speculate=0)
    with pytest.raises(ConfigError, match="there is no such path"):
        DraftConfig.of("./no/such")
    assert DraftConfig.of("org/name").hub is not None
    assert ModelConfig(POCKET, draft_model=DraftConfig(POCKET)).of_draft(POCKET).draft_model is None


def test_the_bars_are_those_of_a_policy_without_a_draft_model() -> None:
    guesses = Guesses(Cache(Capacity(100, 4, 8, 100, 100, 32, guesses=8)))
    row = Sequence(0, [1], Sampling(), 9)
    row.tokens.append(1)
    row.planned = 1
    plain = Speculation(8, 32)
    for each in (plain, guesses._text):
        each.took(1, 0, 1.0)
    assert guesses.bars([row], Queues()) == Bars(plain.bar(1))
