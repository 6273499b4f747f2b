"""The model that the repository ships: its size, the text it was trained on, and that it speaks for itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open

from inflight.contract import FinishReason, Sampling
from inflight.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=2) as made:
        yield made


def test_size() -> None:
    assert sum(file.stat().st_size for file in POCKET.iterdir()) < 10 << 20
    with safe_open(str(POCKET / "model.safetensors"), framework="np") as weights:
        count = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118 -- it is no mapping
    assert 1_000_000 <= count <= 4_000_000


def test_the_training_text_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import pocket_text

    def sample() -> list[str]:
        return [str(each) for each in islice(pocket_text.samples(3), 50)]

    first = sample()
    assert first == sample()
    assert len(set(first)) > 40
    sys.modules.pop("pocket_text", None)


def test_answers(llm: LLM) -> None:
    """Clean sentences in its domain, and it stops by itself."""
    for question, word in (("What is Inflight?", "server"), ("What is prefill?", "prompt")):
        answer = llm.chat([{"role": "user", "content": question}], max_new_tokens=200)
        assert answer.finish_reason is FinishReason.EOS
        assert word in answer.text
        assert answer.text.endswith(".")


def test_stories_are_of_clean_sentences(llm: LLM) -> None:
    samplings = [Sampling(do_sample=True, temperature=0.7, seed=seed) for seed in range(12)]
    asked = [{"role": "user", "content": "Tell me a story."}]
    with ThreadPoolExecutor(len(samplings)) as callers:
        stories = list(callers.map(lambda sampling: llm.chat(asked, sampling, max_new_tokens=400), samplings))
    for story in stories:
        assert story.finish_reason is FinishReason.EOS
        sentences = re.findall(r"[A-Z][^.!?]*[.!?]", story.text)
        assert len(sentences) >= 3
        assert "\ufffd" not in story.text
