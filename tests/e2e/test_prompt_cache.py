"""`inflight serve --prompt-cache`: what one server computed, the next one finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inflight.kernels import native_reason
from tests.e2e.running import Served, eventually, metrics, request, serve
from tests.lm import POCKET

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

JSON = {"Content-Type": "application/json"}
WORDS = "the quick brown fox jumps over the lazy dog and a lion sleeps tonight under many stars "


def ask(served: Served, prompt: str) -> tuple[str, int]:
    body = {"model": "pocket", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    status, answer = request(served.http, "POST", "/v1/completions", json.dumps(body).encode(), JSON)
    assert status == 200, answer
    told = json.loads(answer)
    return told["choices"][0]["text"], told["usage"]["prompt_tokens_details"]["cached_tokens"]


def counted(served: Served, name: str) -> float:
    return sum(metrics(served.http)[f"inflight_prompt_cache_{name}_total"].values())


def test_a_prompt_is_found_after_a_start(tmp_path: Path) -> None:
    """Also by another number of replicas."""
    prompt = WORDS * 30
    command = [str(POCKET), "--threads", "1", "--kv-cache-memory", "64m", "--prompt-cache", str(tmp_path / "kept")]
    with serve(tmp_path, *command) as served:
        text, cached = ask(served, prompt)
        assert cached == 0
        eventually(lambda: counted(served, "written_bytes") > 0)
        served.end()
    with serve(tmp_path, *command, "--replicas", "2") as served:
        again = ask(served, prompt)
        assert again[0] == text
        assert again[1] > 256
        assert counted(served, "tokens") == again[1]
        assert "prompt" not in served.stderr.read_text()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
