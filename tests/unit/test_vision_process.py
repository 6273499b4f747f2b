"""The vision worker's process and the server's end of it."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from inflight.config import GeneratorConfig, RestartPolicy, ServerConfig
from inflight.contract import Media
from inflight.vision.open import encoder_of
from inflight.vision.process import VisionProcess
from tests.vision_models import picture, save_vision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision("smolvlm", tmp_path_factory.mktemp("smolvlm"))


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[VisionProcess]:
    config = GeneratorConfig.of(folder, dtype="float32")
    encoder = encoder_of(config, ServerConfig(restart=RestartPolicy(first_delay=0.05)))
    assert encoder is not None
    await encoder.start()
    try:
        yield encoder
    finally:
        await encoder.stop()


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def test_images_alone_in_a_crowd_and_after_a_death(folder: Path) -> None:
    async def run() -> None:
        async with started(folder) as encoder:
            images = [picture(40 + 10 * n, 30, n) for n in range(4)]
            alone = [await encoder.encode(Media(pixels=image)) for image in images]
            crowd = await asyncio.gather(*(encoder.encode(Media(pixels=image)) for image in images))
            for one, other in zip(alone, crowd):
                assert one.grid == other.grid
                assert one.rows.shape == (sum(encoder.input.runs(one.grid)), encoder.input.hidden)
                assert np.array_equal(one.rows, other.rows)
            file = await encoder.encode(Media(data=png(images[0])))
            assert np.array_equal(file.rows, alone[0].rows)
            waiting = [asyncio.ensure_future(encoder.encode(Media(pixels=image))) for image in images]
            await asyncio.sleep(0)
            before = encoder.pids
            os.kill(before[0], signal.SIGKILL)
            again = await asyncio.wait_for(asyncio.gather(*waiting), 60)
            assert all(np.array_equal(one.rows, other.rows) for one, other in zip(alone, again))
            assert encoder.pids != before

    asyncio.run(run())
