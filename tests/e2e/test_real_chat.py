"""A real GGUF file behind the server, asked with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from inflight.text import load_tokenizer
from tests import real
from tests.e2e.running import serve


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The default configuration, but for a small cache."""
    path = real.need("smollm2")
    root: Path = tmp_path_factory.mktemp("real")
    with (
        serve(root, str(path), "--name", "chat", "--kv-cache-memory", "64m") as served,
        openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0, timeout=120) as made,
    ):
        yield made


def test_it_answers_in_english_and_stops_by_itself(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = client.chat.completions.create(model="chat", messages=question, max_tokens=60, temperature=0)
    text = answer.choices[0].message.content or ""
    assert "Paris" in text
    assert text.endswith(".")
    assert "<|" not in text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    # The template puts the file's own system message before the question, and no token is added to what it makes.
    tokenizer = load_tokenizer(real.need("smollm2"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question[0]['content']}<|im_end|>\n"
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt + "<|im_start|>assistant\n"))


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Write the word hello in German, French and Spanish."}]
    settings: Any = {"model": "chat", "messages": question, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**settings).choices[0].message.content
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(stream=True, **settings)]
    assert "".join(piece or "" for piece in pieces) == whole
    assert whole
