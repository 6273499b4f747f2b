"""The pocket vision model behind the engine, with all its processes: chats with an image, a worker that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from inflight.config import GeneratorConfig, ServerConfig
from inflight.contract import Chat, GenerationRequest, Generator, Media, Whole, whole
from inflight.engine import Engine
from inflight.metrics import Metrics
from inflight.router.language_models import LanguageModels

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket_vision"
T = TypeVar("T")


def serve(tmp_path: Path, test: Callable[[Generator], Awaitable[T]]) -> T:
    async def main() -> T:
        models = LanguageModels(ServerConfig(log_dir=tmp_path), Metrics())
        await models.start([GeneratorConfig.of(POCKET, "pocket", kv_cache_bytes=16 << 20, media_cache_memory=1)])
        try:
            return await asyncio.wait_for(test(models.served["pocket"]), 120)
        finally:
            await models.stop()

    return asyncio.run(main())


def picture(height: int, width: int) -> Media:
    return Media(pixels=np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8))


async def say(model: Generator, messages: list[dict[str, Any]], *media: Media, tenant: str = "") -> Whole:
    prompt = await model.render(Chat(messages))
    request = GenerationRequest(
        prompt, max_new_tokens=12, ignore_eos=True, add_special_tokens=False, media=media, tenant=tenant
    )
    return await whole(model, request)


def turn(text: str, *, image: bool = False) -> dict[str, Any]:
    parts = [{"type": "image"}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def workers() -> list[int]:
    """The processes that encode images."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            found += [child.pid] if "--vision" in child.cmdline() else []
    return found


def test_chats_and_a_worker_that_is_killed(tmp_path: Path) -> None:
    async def test(model: Generator) -> None:
        image, large = picture(70, 90), picture(700, 500)
        messages = [turn("Describe the image.", image=True)]
        first = await say(model, messages, image)
        assert first.start.cached == 0
        messages += [{"role": "assistant", "content": first.finish.text}, turn("And its colour? Which one is it?")]
        second = await say(model, messages, image)
        assert second.start.cached >= first.start.prompt_length // 16 * 16, "the first turn and its image"
        assert isinstance(model, Engine)
        assert model._metrics is not None
        assert model._metrics.images._counts == {("pocket", "encoded"): 1, ("pocket", "skipped"): 1}
        fresh = await say(model, messages, image, tenant="fresh")
        assert fresh.start.cached == 0
        assert [token.info.id for token in fresh.tokens] == [token.info.id for token in second.tokens]

        (before,) = workers()
        os.kill(before, signal.SIGSTOP)  # so that it has the image, and is not done with it
        asked = asyncio.ensure_future(say(model, messages[:1], large))
        while not model.waiting:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert not asked.done()
        os.kill(before, signal.SIGKILL)
        answer = await asked
        (after,) = workers()
        assert after != before
        again = await say(model, messages[:1], large, tenant="again")
        assert not model.streams
        assert [token.info.id for token in answer.tokens] == [token.info.id for token in again.tokens]

    serve(tmp_path, test)
