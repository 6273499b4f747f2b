"""`inflight serve --draft-model`: the same answers, in fewer steps."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from inflight.contract import Sampling
from inflight.kernels import native_reason
from inflight.llm import LLM
from tests.e2e.running import Served, crowd, metrics, request, serve, workers
from tests.lm import POCKET

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

PROMPTS = ["Once upon a time", "A small cat", "The dog", "Once upon a time there was a lion"]
LENGTH = 60


def asked(served: Served, number: int) -> str:
    """A greedy text for even numbers, else a drawn one."""
    drawn = {"temperature": 0.8, "seed": number, "do_sample": True} if number % 2 else {}
    parameters = {"max_new_tokens": LENGTH, **drawn}
    body = json.dumps({"inputs": PROMPTS[number], "parameters": parameters}).encode()
    status, answer = request(served.http, "POST", "/generate", body, {"Content-Type": "application/json"})
    assert status == 200, answer
    text: str = json.loads(answer)["generated_text"]
    return text


def test_a_draft_model_changes_no_answer(tmp_path: Path) -> None:
    """Also when its rank is killed meanwhile; how many tokens it has brought can be read."""
    samplings = [Sampling(do_sample=bool(n % 2), temperature=0.8 if n % 2 else 1.0, seed=n) for n in range(4)]
    with LLM(POCKET, kv_cache_memory=16 << 20, speculate=0) as llm:
        wanted = [each.text for each in llm.generate(PROMPTS, samplings, max_new_tokens=LENGTH)]
    with serve(tmp_path, str(POCKET), "--draft-model", str(POCKET), "--kv-cache-memory", "16m") as served:
        assert [asked(served, number) for number in range(4)] == wanted
        found = metrics(served.http)
        assert found["tgi_request_skipped_tokens_sum"][()] > 0
        [rank] = workers(served.pid)

        def one(number: int) -> str:
            if number == 4:
                os.kill(rank, signal.SIGKILL)
                return ""
            return asked(served, number)

        assert crowd(one, 5)[:4] == wanted
