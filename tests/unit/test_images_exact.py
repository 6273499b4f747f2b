"""Prompts with images through the scheduler and a real runner: the same tokens and log-probabilities, bit for bit, in
any company, in any chunks, from the cache or not. The rows of images are random."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from inflight.config import AdapterConfig
from inflight.contract import EncodedImage, Grid, Sampling, Span
from inflight.shard import ModelRunner
from tests.illustrated import IMAGE, QWENS, WHOLE, save_tiny_vision
from tests.lm import Driver, make_runner
from tests.unit.test_lora import merged, save_adapter

FAMILIES = ["smolvlm", "gemma3", "gemma4", "gemma4_e", "qwen3_vl", "qwen3_5"]
"""Plain ones, those whose tokens of an image see each other, and those with positions by axis and added rows."""

ASK = Sampling(logprobs=True)
COUNT = 6


class Answer(NamedTuple):
    """Of one request: its tokens, their log-probabilities, and how many tokens of the prompt were cached."""

    tokens: list[int]
    logprobs: list[float]
    cached: int | None


def picture(family: str, number: int, rows: int = 3, columns: int = 6, change: float = 0.0) -> EncodedImage:
    """A random image of `rows` * `columns` tokens; `change` is added to a single value."""
    draw = np.random.default_rng(number)
    parts = [draw.standard_normal((rows * columns, 64)).astype(np.float32) for _ in range(3)]
    parts[0][0, 0] += change
    digest = b"%-8d%-8g" % (number, change)
    return EncodedImage(digest, Grid(rows, columns), parts[0], tuple(parts[1:]) if family == "qwen3_vl" else ())


def prompt_of(family: str, parts: Items[list[int] | EncodedImage]) -> dict[str, Any]:
    """The prompt, spans and images of a sequence. A plain family's images have a run for each row of the grid."""
    tokens: list[int] = []
    spans: list[Span] = []
    images: list[EncodedImage] = []
    for part in parts:
        if isinstance(part, list):
            tokens += part
            continue
        total = len(part.rows)
        size = part.grid.columns if family == "smolvlm" else total
        for offset in range(0, total, size):
            grid = part.grid if family in QWENS else None
            spans.append(Span(len(tokens), size, len(images), offset, part.digest, grid, family in WHOLE))
            tokens += [IMAGE] * size + ([7] if size < total else [])
        images.append(part)
    return {"prompt": tokens, "spans": tuple(spans), "images": tuple(images)}


@functools.cache
def folder_of(family: str, base: Path) -> Path:
    return save_tiny_vision(family, base / family)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 480, count).tolist()
    return tokens


def answers(
    runner: ModelRunner, prompts: Items[dict[str, Any]], rounds: int = 1, count: int = COUNT, **limits: int
) -> list[Answer]:
    """Answers of prompts that come together. In several rounds, the last of which is returned, they come again."""
    driver, found = Driver(runner, **limits), []
    for _ in range(rounds):
        requests = []
        for prompt in prompts:
            id = driver.add(count=count, sampling=ASK, **prompt)
            requests.append(driver.scheduler.requests[id])
        driver.drain()
        found = [Answer(driver.out[each.id], driver.logprobs[each.id], each.cached) for each in requests]
    for id in list(runner._batch.ids):  # the next driver's rows have the same ids
        runner._batch.filter(id)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_in_any_company_and_chunks(family: str, base: Path) -> None:
    folder = folder_of(family, base)
    runner = make_runner(folder, threads=1)
    one, two = picture(family, 1), picture(family, 2, 2, 5)
    asked = prompt_of(family, [text(9), one, text(4, 1), two, two, text(8, 2)])
    alone = answers(runner, [asked])[0]
    other = prompt_of(family, [text(9), two, text(4, 1), one, two, text(8, 2)])
    assert answers(runner, [other])[0].logprobs != alone.logprobs, "images make a difference"
    threaded = make_runner(folder, threads=2)
    crowd = [other, {"prompt": text(30, 3)}, asked, prompt_of(family, [one, text(3, 4)]), {"prompt": text(70, 5)}]
    for size in (1, 7, 64, 512):
        if family in WHOLE and size < 18:
            continue  # refused at the start
        found = answers(threaded, crowd, max_prefill_tokens=size, max_step_tokens=size + 16)
        assert found[2][:2] == alone[:2], size
    runner = make_runner(folder, threads=2)
    assert answers(runner, crowd, max_prefill_tokens=64, mixed_tokens=5)[2][:2] == alone[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_cache(family: str, base: Path) -> None:
    """A hit ends in the middle of the image: its last block also holds text."""
    runner = make_runner(folder_of(family, base), threads=1)
    # 5 tokens of text, 18 of the image (and of markers), 1 of text: 23 may be cached, in blocks of 4.
    asked = prompt_of(family, [text(5), picture(family, 1), text(1, 1)])
    first = answers(runner, [asked])[0]
    again = answers(runner, [asked], rounds=2)[0]
    whole = asked["spans"][-1]
    assert again.cached is not None
    assert whole.start < again.cached < whole.stop
    assert again[:2] == first[:2]
    changed = prompt_of(family, [text(5), picture(family, 1, change=1e-3), text(1, 1)])
    found = answers(runner, [asked, changed, asked, changed], rounds=2)
    assert found[0][:2] == found[2][:2] == first[:2]
    assert found[1][:2] == found[3][:2] == answers(runner, [changed])[0][:2] != first[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_changed_is_computed_anew(family: str, base: Path) -> None:
    runner = make_runner(folder_of(family, base), threads=1)
    driver = Driver(runner)
    cached = []
    for change in (0.0, 1e-3, 2e-3, 0.0):
        prompt = prompt_of(family, [text(9), picture(family, 1, change=change), text(9, 1)])
        request = driver.scheduler.requests[driver.add(count=COUNT, sampling=ASK, **prompt)]
        driver.drain()
        cached.append(request.cached)
    # Up to the block in which the image begins; a state lies there as soon as two prompts have parted there.
    assert cached[:3] == ([0, 0, 8] if family == "qwen3_5" else [0, 8, 8])
    assert cached[3] == (len(prompt["prompt"]) - 1) // 4 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn(family: str, base: Path) -> None:
    """The prompt of a turn is that of the turn before, its answer and more; it begins behind the image."""
    runner = make_runner(folder_of(family, base), threads=1)
    first = prompt_of(family, [text(9), picture(family, 1), text(9, 1)])
    driver = Driver(runner)
    said = driver.add(count=COUNT, sampling=ASK, **first)
    driver.drain()
    second = {**first, "prompt": first["prompt"] + driver.out[said] + text(5, 2)}
    next = driver.add(count=COUNT, sampling=ASK, **second)
    request = driver.scheduler.requests[next]
    driver.drain()
    assert request.cached is not None
    assert request.cached >= first["spans"][-1].stop
    found = driver.out[next], driver.logprobs[next]
    for id in list(runner._batch.ids):
        runner._batch.filter(id)
    assert found == answers(runner, [second])[0][:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_preemption(family: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds their prompts and not what they become; one that loses its blocks is computed again."""
    runner = make_runner(folder_of(family, base), threads=1)
    prompts = [prompt_of(family, [text(3, n), picture(family, n), text(2)]) for n in range(3)]
    alone = [answers(runner, [prompt], count=30)[0][:2] for prompt in prompts]
    monkeypatch.setattr("inflight.sched.cache.EXPECTED_OUTPUT", 0)
    length = len(prompts[0]["prompt"])
    driver = Driver(runner, num_blocks=3 * (length + 3) // 4)
    ids = [driver.add(count=30, sampling=ASK, **prompt) for prompt in prompts]
    driver.drain()
    assert driver.scheduler.preemptions
    assert [(driver.out[id], driver.logprobs[id]) for id in ids] == alone


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl"])
def test_with_an_adapter(family: str, base: Path, tmp_path: Path) -> None:
    """An adapter changes the language part only: tokens are those of the model that it is merged into."""
    folder = folder_of(family, base)
    language = r"(text|language)_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
    adapter = save_adapter(folder, tmp_path / "adapter", 1, only=language)
    whole = make_runner(merged(folder, adapter, tmp_path / "merged"), cpu_engine="torch")
    runner = make_runner(folder, adapters=(AdapterConfig("one", adapter),), kv_cache_bytes=16 << 20)
    asked = prompt_of(family, [text(9), picture(family, 1), text(4, 1), picture(family, 2, 2, 5), text(8, 2)])
    wanted = [answers(each, [asked])[0] for each in (make_runner(folder, cpu_engine="torch"), whole)]
    found = answers(runner, [asked, {**asked, "adapter": 1}, asked, {**asked, "adapter": 1}], max_prefill_tokens=20)
    assert [each.tokens for each in found] == [each.tokens for each in wanted] * 2
    assert wanted[0].tokens != wanted[1].tokens
