"""Requests with images to a rank that is killed: the same tokens. The rank is a process; rows of images are random."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from inflight.config import GeneratorConfig, RestartPolicy, ServerConfig
from inflight.contract import EncodedImage, Finish, GenerationRequest, Grid, Media, Sampling, Start, Token, whole
from inflight.engine import Engine, ShardGroup
from inflight.text import Tokenizer
from tests.fake_vision import FakeInput, FakeVision, image
from tests.illustrated import IMAGE, save_tiny_vision

COUNT = 40
REQUEST = GenerationRequest(
    "w5 w9 <image> w11 <image> w7",
    Sampling(logprobs=True),
    COUNT,
    ignore_eos=True,
    media=(image(1, 40, 40), image(2, 30, 40)),
)
"""Of 2800 tokens of images, whose rows are 2 megabytes."""


class Qwen(FakeInput):
    """Images of `rows` by `columns` tokens in one run."""

    def runs(self, grid: Grid) -> list[int]:
        return [grid.rows * grid.columns]

    def positions(self, grid: Grid) -> Grid | None:
        return grid


class QwenVision(FakeVision):
    """Of Qwen3-VL, whose images have rows for deeper layers, and of Qwen3.5."""

    deep = True

    def encoded(self, media: Media) -> EncodedImage:
        found = super().encoded(media)
        if not self.deep:
            return found
        return replace(found, added=(np.sin(found.rows), np.cos(found.rows)))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", pytest.param("gemma4_e", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed(family: str, tmp_path: Path) -> None:
    folder = save_tiny_vision(family, tmp_path / "model", max_position_embeddings=4096)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    input = Qwen(f"w{IMAGE}", IMAGE, 64)
    input.before, input.after = "w401", "w402"
    config = GeneratorConfig.of(
        folder,
        "qwen",
        dtype="float32",
        device_type="cpu",
        kv_cache_bytes=16 << 20,
        max_batch_prefill_tokens=256,
    )

    async def main() -> None:
        shards = ShardGroup(config, ServerConfig(log_dir=tmp_path))
        vision = QwenVision(input)
        vision.deep = family == "qwen3_vl"
        quick = RestartPolicy(first_delay=0.05, max_delay=0.1)
        engine = Engine(config, Tokenizer(inner, (), {}, None), shards, quick, vision=vision)
        await engine.start()

        async def answer(tenant: str, kill_at: int | None = None) -> list[tuple[int, float | None]]:
            """Tokens with their log-probabilities, for a tenant whose prompts are not cached yet."""
            found: list[tuple[int, float | None]] = []
            async for event in engine.generate(replace(REQUEST, tenant=tenant)):
                if isinstance(event, Start):
                    assert event.prompt_length == 2800 + 4 + 4
                elif isinstance(event, Token):
                    found.append((event.info.id, event.info.logprob))
                    if len(found) == kill_at:
                        os.kill(shards.pids[0], signal.SIGKILL)
                else:
                    assert isinstance(event, Finish)
            return found

        try:
            wanted = await answer("")
            assert len(wanted) == COUNT
            assert await answer("killed", kill_at=3) == wanted
            asked = asyncio.ensure_future(answer("early"))
            await until(lambda: engine.running > 0)
            os.kill(shards.pids[0], signal.SIGKILL)  # the prompt takes a dozen steps
            assert await asked == wanted
            assert (await whole(engine, replace(REQUEST, tenant="early"))).start.cached > 2700
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)
