"""The vision worker's process and the server's end of it."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from inflight.config import GeneratorConfig, RestartPolicy, ServerConfig
from inflight.contract import Media
from inflight.errors import DeadlineExceeded, InvalidRequest, StartError, Unavailable
from inflight.place import Launch, WorkerProcess
from inflight.vision import open_vision
from inflight.vision.open import encoder_of
from inflight.vision.process import VisionProcess
from inflight.vision.worker import NICE
from tests.vision_models import picture


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(__file__).resolve().parents[2] / "models" / "pocket_vision"


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
            [pid] = encoder.pids
            assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
            group = Path(f"/proc/{pid}/autogroup")
            assert not group.exists() or group.read_text().endswith(f"nice {NICE}\n")
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


DEADLY = """
import os, sys, time
import inflight.vision.decode as module
real = module.decode
def decode(data, most):
    if data == b"abort":
        os.abort()
    if data == b"hang":
        time.sleep(600)
    if data == b"hungry":
        return bytearray(3 << 30)
    return real(data, most)
module.decode = decode
from inflight.vision import run_vision
os._exit(run_vision(int(sys.argv[1])))
"""


def start_deadly(launch: Launch) -> WorkerProcess:
    """A worker that dies, or hangs, of certain files."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", DEADLY, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True)
    theirs.close()
    return WorkerProcess(process, ours)


def test_an_image_that_ends_the_worker_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with started(folder) as encoder:
            image = picture(50, 40)
            wanted = await encoder.encode(Media(pixels=image))
            hungry = encoder.encode(Media(data=b"hungry"))
            with pytest.raises(InvalidRequest, match="the image cannot be decoded: it takes too much memory"):
                await hungry
            calls = [Media(pixels=image), Media(data=b"abort"), Media(pixels=image), Media(data=png(image))]
            results = await asyncio.gather(*(encoder.encode(each) for each in calls), return_exceptions=True)
            good, bad = [results[0], *results[2:]], results[1]
            assert isinstance(bad, InvalidRequest)
            assert str(bad) == "the image cannot be decoded"
            for each in good:
                assert not isinstance(each, BaseException)
                assert np.array_equal(each.rows, wanted.rows)
            slow, quick = await asyncio.gather(
                encoder.encode(Media(data=b"hang"), timeout=0.3),
                encoder.encode(Media(pixels=image)),
                return_exceptions=True,
            )
            assert isinstance(slow, DeadlineExceeded)
            assert not isinstance(quick, BaseException)
            assert np.array_equal(quick.rows, wanted.rows)
            [pid] = encoder.pids
        with pytest.raises(Unavailable):
            await encoder.encode(Media(pixels=image))
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    monkeypatch.setattr("inflight.vision.process.start_worker", start_deadly)
    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_start_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(folder / "model.safetensors")
    name = "model.vision_model.post_layernorm.weight"
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(StartError, match=re.escape(name)):  # the worker's own text
        asyncio.run(_start(broken))
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(StartError, match=r"neither preprocessor_config\.json nor processor_config\.json"):
        asyncio.run(_start(broken))


async def _start(folder: Path) -> None:
    async with started(folder):
        pass


def test_a_folder_without_a_tower_reads_text(folder: Path, tmp_path: Path) -> None:
    """Fine-tuned models are sometimes saved with the whole config and the language model alone."""
    from safetensors.numpy import load_file, save_file

    text = tmp_path / "text"
    shutil.copytree(folder, text)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "vision" not in name}, text / "model.safetensors")
    assert open_vision(GeneratorConfig.of(text)) is None
    (text / "preprocessor_config.json").unlink()
    assert open_vision(GeneratorConfig.of(text)) is None
    assert open_vision(GeneratorConfig.of(folder)) is not None
