"""Nothing that a client can send reaches a rank and breaks it there; what a rank finds wrong fails one row only."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from inflight.config import GeneratorConfig
from inflight.contract import AdmittedRow, Finish, GenerationRequest, Grammar, Sampling, StepPlan
from inflight.engine import Engine
from inflight.errors import InflightError, InvalidRequest, ModelError
from inflight.llm import LLM
from inflight.llm.local import LocalExecutor
from inflight.text import load_tokenizer
from inflight.tgi_shard.batches import Asked, Batches
from tests.lm import job, make_runner, more_tokens_than_rows, run

PROMPT = "Once upon a time there was a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedding has 2048 rows, the tokenizer knows two more: <image> and <end>."""
    return more_tokens_than_rows(tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, kv_cache_memory=8 << 20, threads=1, max_batch_size=8) as made:
        yield made


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "a <image> here"}, r"token 2048 \('<image>'\) does not exist in this model, whose tokens are 0 to "),
    ({"prompts": [[5, 2049]]}, r"token 2049 \('<end>'\)"),
    ({"prompts": [[5, 1 << 40]]}, "token 1099511627776 does not exist"),
    ({"prompts": [[5, -1]]}, "token -1 does not exist"),
    ({"prompts": [[5, 1.5]]}, "whole numbers"),
    ({"prompts": [[5, "x"]]}, "whole numbers"),
    ({"prompts": [None]}, "whole numbers"),
    ({"sampling": Sampling(logit_bias=((2048, 1.0),))}, "`logit_bias` names token 2048"),
    ({"sampling": Sampling(logit_bias=((-1, 1.0),))}, "`logit_bias` names token -1"),
    ({"sampling": Sampling(logit_bias=((1, math.nan),))}, "must be a number"),
    ({"sampling": Sampling(temperature=0.0)}, "`temperature` must be strictly positive"),
    ({"sampling": Sampling(temperature=math.nan)}, "`temperature`"),
    ({"sampling": Sampling(do_sample=True, top_k=1 << 70)}, "`top_k`"),
    ({"sampling": Sampling(top_n_tokens=-1)}, "`top_n_tokens`"),
    ({"sampling": Sampling(seed=1 << 64)}, "`seed`"),
    ({"sampling": Sampling(repetition_penalty=1e-300)}, "`repetition_penalty`"),
    ({"sampling": Sampling(presence_penalty=math.inf)}, "`presence_penalty`"),
    ({"sampling": Sampling(top_p="much")}, "wrong type"),  # type: ignore[arg-type]
    ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number of at least 1"),
    ({"max_new_tokens": [2.5]}, "`max_new_tokens` must be a whole number"),
    ({"grammar": Grammar("lark", "start: <image>")}, "wants a token that the tokenizer knows and the model"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "text"), WRONG)
def test_what_no_rank_could_compute_is_refused(llm: LLM, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        llm.generate(**{"prompts": PROMPT, **wrong})


def test_those_who_run_meanwhile_do_not_notice(llm: LLM) -> None:
    alone = llm.generate(PROMPT, max_new_tokens=40)[0].token_ids
    starts = llm.engine._executors[0]._runner  # type: ignore[attr-defined]

    async def go() -> tuple[list[int], list[BaseException]]:
        async def good() -> list[int]:
            return [event.info.id async for event in llm.engine.generate(request(PROMPT)) if hasattr(event, "info")]

        async def bad(prompt: Any, **more: Any) -> None:
            async for _ in llm.engine.generate(request(prompt, **more)):
                pass

        tasks = [bad(f"{number} <image>") for number in range(20)] + [bad([2048]), bad("<image>", embed=True)]
        found = await asyncio.gather(good(), *tasks, return_exceptions=True)
        assert isinstance(found[0], list)
        return found[0], [each for each in found[1:] if isinstance(each, BaseException)]

    tokens, errors = llm._call(go())
    assert tokens == alone
    assert len(errors) == 22
    assert all(isinstance(error, InvalidRequest) for error in errors)
    assert llm.engine._executors[0]._runner is starts  # type: ignore[attr-defined]


def request(prompt: Any, **more: Any) -> GenerationRequest:
    return GenerationRequest(prompt, max_new_tokens=None if "embed" in more else 40, **more)


def test_numbers_of_numpy_are_ids(llm: LLM) -> None:
    ids = [1, 70, 226, 9]
    assert llm.generate([np.array(ids)])[0].token_ids == llm.generate([ids])[0].token_ids


def test_a_grammar_ends_with_an_end_that_the_model_has(folder: Path, llm: LLM) -> None:
    """The first end token that the folder names is beyond the embedding."""
    assert load_tokenizer(folder).eos_ids[0] == 2049
    (found,) = llm.generate(PROMPT, max_new_tokens=40, grammar=Grammar("regex", "(yes|no) [0-9]{3}"))
    assert found.text[:3] in ("yes", "no ")
    assert found.finish_reason.value == "eos_token"
    assert found.token_ids[-1] < 2048


def test_without_any_such_end_a_grammar_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_ids = (2049,)
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        tokenizer.grammars(2048).compile(Grammar("regex", "a+"))


# What a rank finds wrong: admission would have refused it, so that it is let in by hand here


@pytest.mark.parametrize("engine", ["", "torch"])
def test_a_row_that_is_wrong_fails_alone(folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours get their tokens, also the one that shares the blocks before the wrong token."""
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", engine)
    shared = [1, 70, 226, 9, 300, 301, 302, 303, 304, 305]
    alone = run(make_runner(folder), [[*shared, 9]], 6)[0]
    runner = make_runner(folder)
    plan = StepPlan(
        runner._step,
        prefill=[
            AdmittedRow(1, 11, [0, 1, 2], [*shared, 2048], 11, 0, Sampling()),
            AdmittedRow(2, 3, [0, 1, 3], [*shared, 9], 11, 8, Sampling()),
            AdmittedRow(3, 2, [4], [5, 6], 2, 0, Sampling(do_sample=True, logit_bias=((5000, 1.0),))),
            AdmittedRow(4, 2, [5], [5, -7], 2, 0, Sampling(top_k=-3)),
        ],
    )
    result = runner.run(plan)
    assert result is not None
    assert list(result.failed) == [1, 3, 4]
    assert "token 2048 does not exist" in result.failed[1]
    assert "`logit_bias` names token 5000" in result.failed[3]
    tokens = [result.tokens[result.ids.index(2)]]
    leaving = [1, 3, 4]
    for step in range(1, 6):
        grants = [(2, 6)] if step == 2 else []
        result = runner.run(StepPlan(plan.step + step, leaving, grants=grants))
        assert result is not None
        assert result.ids == [2]
        assert not result.failed
        tokens += result.tokens
        leaving = []
    assert tokens == alone


def test_the_engine_tells_one_caller(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.check = lambda tokens, vocab_size: None  # type: ignore[method-assign]

    async def main() -> list[Any]:
        engine = Engine(GeneratorConfig.of(folder, "m"), tokenizer, LocalExecutor(job(folder)))
        await engine.start()

        async def one(prompt: str) -> Any:
            return [event async for event in engine.generate(request(prompt))][-1]

        try:
            prompts = [PROMPT, f"{PROMPT} <image>", "<image>", PROMPT]
            found = await asyncio.gather(*map(one, prompts), return_exceptions=True)
            again = await one(PROMPT)
            return [*found, again]
        finally:
            await engine.stop()

    first, *wrong, last, again = asyncio.run(main())
    assert isinstance(first, Finish)
    assert first.text == last.text == again.text
    for error in wrong:
        assert isinstance(error, InvalidRequest)
        assert "token 2048 does not exist" in str(error)


def test_a_foreign_router_is_told(folder: Path) -> None:
    """`generate.v3` has no error for one row: the call is refused before anything runs, and its batches stay."""
    batches = Batches(make_runner(folder), load_tokenizer(folder))

    def asked(id: int, tokens: list[int], sampling: Sampling = Sampling()) -> Asked:
        return Asked(id, tokens, [3 * id, 3 * id + 1], 0, sampling, 5)

    batches.prefill(1, [asked(1, [1, 70])])
    refusals: list[tuple[Callable[[], Asked], str]] = [
        (lambda: asked(2, [1, 2048]), "'<image>'"),
        (lambda: asked(2, [1], Sampling(temperature=math.nan)), "`temperature`"),
    ]
    for make, text in refusals:
        with pytest.raises(InflightError, match=text):
            batches.prefill(2, [asked(3, [1, 2]), make()])
    outcome = batches.decode([1])
    assert [one.row.asked.id for [one] in outcome.generated] == [1]
    assert batches.rows == 1


@pytest.mark.parametrize("engine", ["", "torch"])
def test_a_foreign_router_is_told_of_logits_that_are_no_numbers(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call fails as the model's fault; a batch beside it goes on as if nothing had been."""
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", engine)
    shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][70] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    batches = Batches(make_runner(tmp_path / "broken"), load_tokenizer(folder))

    def asked(id: int, tokens: list[int], sampling: Sampling = Sampling()) -> Asked:
        return Asked(id, tokens, [3 * id, 3 * id + 1], 0, sampling, 5)

    first = batches.prefill(1, [asked(1, [1, 71])]).generated[0][0].token
    for sampling in (Sampling(), Sampling(do_sample=True, top_p=0.5, logprobs=True)):
        with pytest.raises(ModelError, match="not all numbers"):
            batches.prefill(2, [asked(2, [1, 70], sampling), asked(3, [1, 72])])
    second = batches.decode([1]).generated[0][0].token
    alone = Batches(make_runner(folder), load_tokenizer(folder))
    assert alone.prefill(1, [asked(1, [1, 71])]).generated[0][0].token == first
    assert alone.decode([1]).generated[0][0].token == second


def test_configs_say_what_the_test_wants(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 2048
    assert load_tokenizer(folder).encode("<image>", False) == [2048]
