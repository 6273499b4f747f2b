"""`inflight.LLM` on the pocket model: the same tokens whatever happens around a request."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import inflight
from inflight.contract import FinishReason, Sampling
from inflight.errors import InvalidRequest, StartError
from inflight.llm import LLM

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
PROMPTS = [
    "Tell me a story about a cat named Mia.",
    "What is Inflight?",
    "What is prefill?",
    "Once upon a time",
    "What is 7 plus 5?",
    "How do I start a server?",
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(POCKET, kv_cache_memory=64 << 20, threads=2) as made:
        yield made


def crowd(count: int = 32) -> tuple[list[str], list[Sampling]]:
    """Prompts of mixed lengths; every third one is sampled, each in another way."""
    draw = random.Random(5)
    prompts, samplings = [], []
    for number in range(count):
        text = " ".join(draw.choices(PROMPTS, k=draw.choice((1, 1, 2, 5))))
        prompts.append(f"{number}. {text}")
        kinds: list[dict[str, Any]] = [
            {},
            {"do_sample": True, "seed": number, "temperature": 0.8},
            {"do_sample": True, "seed": 2**63 + number, "top_p": 0.9, "top_k": 40},
            {"repetition_penalty": 1.2, "presence_penalty": 0.3},
        ]
        samplings.append(Sampling(**kinds[number % 4]))
    return prompts, samplings


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """Tokens of each of the crowd, one after the other."""
    prompts, samplings = crowd()
    return [
        llm.generate(prompt, one, max_new_tokens=40, ignore_eos=True)[0].token_ids
        for prompt, one in zip(prompts, samplings)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_prefill_tokens": 7},
        {"max_batch_mixed_tokens": 3},
        {"plans_in_flight": 1},
        {"kv_cache_memory": 3 << 20, "max_total_tokens": 512},
        {"block_size": 1},
        pytest.param({"max_batch_size": 5}, marks=pytest.mark.slow),
    ],
    ids=[
        "crowd",
        "small chunks",
        "few beside streams",
        "one plan in flight",
        "preemption",
        "blocks of one token",
        "few rows",
    ],
)
def test_the_same_tokens(settings: dict[str, Any], alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, samplings = crowd()
    # Admission that expects too little is what makes preemption happen.
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 1)
    with LLM(POCKET, **{"kv_cache_memory": 64 << 20, "threads": 2, **settings}) as llm:
        found = llm.generate(prompts, samplings, max_new_tokens=40, ignore_eos=True)
        assert [one.token_ids for one in found] == alone
        again = llm.generate(prompts, samplings, max_new_tokens=40, ignore_eos=True)
        assert [one.token_ids for one in again] == alone
        if "kv_cache_memory" in settings:
            assert llm.engine._lanes.all[0].scheduler.preemptions
        elif settings.get("block_size") != 1:
            assert any(one.cached for one in again)


def test_tokens_are_those_of_transformers(llm: LLM) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    for prompt, found in zip(PROMPTS, llm.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        wanted = model.generate(
            ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found.token_ids == wanted[0, ids.shape[1] :].tolist()


def test_max_new_tokens_is_exact(llm: LLM) -> None:
    for count in (1, 2, 17, 200):
        (found,) = llm.generate("Once", max_new_tokens=count, ignore_eos=True)
        assert len(found.tokens) == count
        assert found.finish_reason is FinishReason.LENGTH


def test_it_stops_by_itself(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "What is Inflight?"}], max_new_tokens=200)
    assert answer.finish_reason is FinishReason.EOS
    assert "Inflight" in answer.text


def test_a_chat_is_shown_as_the_chat_route_shows_it(llm: LLM) -> None:
    asked: dict[str, object] = {"role": "user", "content": "What is Inflight?"}
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    history: list[dict[str, object]] = [
        asked,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "a server"},
    ]
    answer = llm.chat(history, Sampling(prompt_logprobs=True), max_new_tokens=2)
    prompt = "".join(token.text for token in answer.prompt)
    assert '{"name": "look", "arguments": {}}' in prompt
    assert prompt.endswith("<|user|>Result of the function: a server<|end|><|assistant|>")
    going_on = llm.chat(
        [asked, {"role": "assistant", "content": "a"}], Sampling(prompt_logprobs=True), max_new_tokens=2
    )
    assert "".join(token.text for token in going_on.prompt).endswith("<|end|><|assistant|>a")


def test_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    sampling = Sampling(logprobs=True, prompt_logprobs=True, top_n_tokens=3, prompt_top=3)
    (found,) = llm.generate(PROMPTS[0], sampling, max_new_tokens=12, ignore_eos=True)
    ids = [token.id for token in found.prompt] + found.token_ids
    with torch.inference_mode():
        wanted = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    assert found.prompt[0].logprob is None
    chances = [wanted[place - 1, token].item() for place, token in enumerate(ids) if place]
    reported = [token.logprob for token in (*found.prompt[1:], *found.tokens)]
    assert reported == pytest.approx(chances, abs=1e-4)
    assert found.prompt_top[0] == ()
    for place, (token, top) in enumerate(zip(found.prompt[1:], found.prompt_top[1:])):
        best = wanted[place].topk(3)
        assert [one.id for one in top] == best.indices.tolist()
        assert [one.logprob for one in top] == pytest.approx(best.values.tolist(), abs=1e-4)
        # Whoever asks whether a token is the most likely one compares the numbers.
        assert token.logprob in [one.logprob for one in top if one.id == token.id] or token.id not in best.indices


def test_seeds(llm: LLM) -> None:
    def draw(seed: int) -> list[int]:
        return llm.generate("Once upon a time", Sampling(do_sample=True, seed=seed), max_new_tokens=30)[0].token_ids

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(6)}) > 3


def test_what_cannot_be_asked(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="must have less than"):
        llm.generate("story " * 3000)
    with pytest.raises(InvalidRequest, match="must be <= 1024"):
        llm.generate("story", max_new_tokens=5000)
    with pytest.raises(InvalidRequest, match="2 prompts and 1 samplings"):
        llm.generate(["a", "b"], [Sampling()])
    with pytest.raises(StartError, match=r"is no folder"):
        LLM("/nowhere")


def test_it_is_imported_when_it_is_named_and_without_torch() -> None:
    assert inflight.LLM is LLM
    import subprocess
    import sys

    code = (
        "import inflight, sys; assert 'inflight.llm' not in sys.modules; "
        "inflight.LLM; assert 'inflight.llm' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
