"""What each precision of the CPU engine costs: perplexity of the pocket model over its held-out text."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from inflight.contract import Sampling
from inflight.kernels import native_reason
from inflight.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

BOUNDS: dict[str, tuple[float, dict[str, Any]]] = {
    "float32": (0.0001, {}),
    "bfloat16": (0.005, {"dtype": "bfloat16"}),
    "int8": (0.005, {"quantize": "int8"}),
    "int4": (0.03, {"quantize": "int4"}),
    "bfloat16, cache in int8": (0.005, {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
}
"""Most that it may rise, as a share of torch's float32."""


@pytest.fixture(scope="module")
def documents() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import pocket_text

        return [sample.render() for sample in islice(pocket_text.samples(11, validation=True), 60)]


@pytest.fixture(scope="module")
def reference(documents: list[str]) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLIGHT_CPU_ENGINE", "torch")
        return perplexity(documents)


def perplexity(documents: list[str], **settings: Any) -> float:
    with LLM(ROOT / "models" / "pocket", kv_cache_memory=32 << 20, threads=2, **settings) as llm:
        prompts = [llm._call(llm.engine.tokenize(text, add_special_tokens=False)) for text in documents]
        ids = [[piece.id for piece in prompt] for prompt in prompts]
        found = llm.generate(ids, Sampling(prompt_logprobs=True), max_new_tokens=1)
    values = [token.logprob for one in found for token in one.prompt if token.logprob is not None]
    assert len(values) > 4000
    return math.exp(-sum(values) / len(values))


@pytest.mark.parametrize("name", BOUNDS)
def test_perplexity_stays_within_its_bound(name: str, documents: list[str], reference: float) -> None:
    bound, settings = BOUNDS[name]
    assert perplexity(documents, **settings) / reference - 1 == pytest.approx(0.0, abs=bound)
