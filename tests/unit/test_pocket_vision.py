"""The vision model that the repository ships: its size, the pictures that it was trained on, and that it sees."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from inflight.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket_vision"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules that draw the pictures and that train on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("pocket_pictures"), importlib.import_module("train_pocket_vision")


def test_size() -> None:
    assert sum(file.stat().st_size for file in POCKET.iterdir()) < 10 << 20
    with safe_open(str(POCKET / "model.safetensors"), framework="np") as weights:
        count = sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118 -- it is no mapping
    assert 1_000_000 <= count <= 4_000_000


def test_the_pictures_are_always_the_same_and_the_held_out_ones_others(scripts: tuple[Any, Any]) -> None:
    pictures, _ = scripts

    def drawn(validation: bool) -> list[tuple[str, bytes]]:
        rng = random.Random(5)
        scenes = [pictures.draw_scene(rng, validation) for _ in range(30)]
        return [(scene.key, pictures.render(scene, rng)[0].tobytes()) for scene in scenes]

    learned, held_out = drawn(False), drawn(True)
    assert learned == drawn(False)
    assert not {key for key, _ in learned} & {key for key, _ in held_out}


def test_the_pictures_are_prepared_as_the_folder_says(scripts: tuple[Any, Any]) -> None:
    from transformers import AutoImageProcessor

    pictures, training = scripts
    process = AutoImageProcessor.from_pretrained(POCKET, backend="pil")
    rng = random.Random(6)
    for size in (None, None, (1, 150), (300, 211), (64, 64)):
        picture, _ = pictures.render(pictures.draw_scene(rng), rng)
        picture = picture.resize(size or picture.size)
        found = np.asarray(process(picture)["pixel_values"][0])
        assert np.array_equal(found, training.prepare(picture)[None])


def test_llm_describes_pictures_as_transformers_does(scripts: tuple[Any, Any]) -> None:
    """Pictures that training did not show, as arrays, several prompts at once; and a text without a picture."""
    _, training = scripts
    cases = training.held_out_cases(16, asked=True)
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=1) as llm:
        prompts = [{"prompt": case.question, "images": [np.asarray(case.picture)]} for case in cases]
        found = [one.text for one in llm.generate(prompts, max_new_tokens=40)]
        assert found == training.answers(POCKET, cases)
        (alone,) = llm.generate(
            ["<|im_start|>User:Describe the image.<end_of_utterance>\nAssistant:"], max_new_tokens=40
        )
        assert alone.text == "I see no picture."
