"""`inflight serve --prompt-cache`: what one server computed, the next one finds."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inflight.kernels import native_reason
from tests.e2e.running import Served, eventually, metrics, request, serve
from tests.lm import POCKET
from tests.unit.test_lora import save_adapter

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

JSON = {"Content-Type": "application/json"}
WORDS = "the quick brown fox jumps over the lazy dog and a lion sleeps tonight under many stars "


def ask(served: Served, prompt: str, model: str = "pocket") -> tuple[str, int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
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


def written(served: Served, pages: int) -> None:
    """Waits until so many files were written in all."""
    folder = Path(served.cwd.parent / "kept")
    eventually(lambda: len(list(folder.glob("*/*.kv"))) >= pages, 30)


def pictured(colour: int) -> str:
    """A picture as a URL; all have one size."""
    image = np.full((48, 64, 3), colour, np.uint8)
    image[8:24, 8:40] = 255 - colour
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def look(served: Served, colour: int, words: str) -> tuple[list[float], int]:
    """Log-probabilities of an answer about a picture that stands before the words, and the prompt's tokens that were
    cached."""
    parts = [{"type": "image_url", "image_url": {"url": pictured(colour)}}, {"type": "text", "text": words}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    sent = json.dumps({**body, "logprobs": True}).encode()
    status, answer = request(served.http, "POST", "/v1/chat/completions", sent, JSON)
    assert status == 200, answer
    told = json.loads(answer)
    logged = [each["logprob"] for each in told["choices"][0]["logprobs"]["content"]]
    return logged, told["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_chat_about_a_picture_is_found_after_a_start(tmp_path: Path) -> None:
    """Never by another picture of the same size, nor in a file that is damaged."""
    kept, vision = tmp_path / "kept", POCKET.parent / "pocket_vision"
    command = [str(vision), "--threads", "1", "--kv-cache-memory", "64m", "--prompt-cache", str(kept)]
    words, other = WORDS * 14, WORDS.upper() * 14
    with serve(tmp_path, *command) as served:
        wanted = look(served, 40, words)
        assert wanted[1] == 0
        written(served, 2)
        before = set(kept.glob("*/*.kv"))
        damaged = look(served, 40, other)
        written(served, len(before) + 2)
        served.end()
    for file in set(kept.glob("*/*.kv")) - before:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with serve(tmp_path, *command) as served:
        another = look(served, 200, words)
        assert another[0] != wanted[0]
        assert (another[1], counted(served, "tokens")) == (0, 0)
        again = look(served, 40, words)
        assert again[0] == wanted[0]
        assert counted(served, "tokens") == again[1] >= 256
        assert look(served, 40, other) == (damaged[0], damaged[1])
        assert counted(served, "tokens") == again[1]


def test_prompts_of_adapters_are_found_by_what_the_adapters_hold(tmp_path: Path) -> None:
    """Whatever their names and places; never by another adapter or by the model alone."""
    folders = {name: save_adapter(POCKET, tmp_path / name, seed) for seed, name in enumerate(("red", "blue", "new"), 1)}
    command = [str(POCKET), "--threads", "1", "--kv-cache-memory", "64m", "--prompt-cache", str(tmp_path / "kept")]

    def listed(**adapters: str) -> list[str]:
        return ["--lora-adapters", ",".join(f"{name}={folders[folder]}" for name, folder in adapters.items())]

    prompt = WORDS * 24
    with serve(tmp_path, *command, *listed(red="red", blue="blue")) as served:
        first = {name: ask(served, prompt, name) for name in ("pocket", "red", "blue")}
        assert [cached for _, cached in first.values()] == [0] * 3
        written(served, 6)
        served.end()
    with serve(tmp_path, *command, *listed(red="new", green="red", blue="blue")) as served:
        assert ask(served, prompt, "red")[1] == 0
        assert counted(served, "tokens") == 0
        for name, like in (("pocket", "pocket"), ("green", "red"), ("blue", "blue")):
            text, cached = ask(served, prompt, name)
            assert (text, cached > 256) == (first[like][0], True), name
