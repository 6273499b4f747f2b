"""Pictures all the way to tokens: families, towers, engine and language models against transformers' whole models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from inflight.config import GeneratorConfig, ModelConfig, VisionConfig
from inflight.contract import GenerationRequest, ImageInput, Media, Sampling, ShardJob, Start, Token
from inflight.engine import Engine
from inflight.llm.local import LocalExecutor
from inflight.text import load_tokenizer
from inflight.vision.encoder import Encoded
from inflight.vision.families import Family
from inflight.vision.service import VisionService
from inflight.vision.towers import load_tower
from tests.illustrated import QWENS
from tests.unit.test_vision_families import Opened
from tests.vision_models import MAKERS, picture

COUNT = 4
KINDS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids", **dict.fromkeys(QWENS, "mm_token_type_ids")}
"""What transformers wants to be told of the tokens: which are an image's."""


class Inside:
    """An `Encoder` in this process."""

    def __init__(self, opened: Opened) -> None:
        self._family: Family = opened.family
        self._tower = load_tower(opened.folder, ModelConfig(opened.path, dtype="float32"), 1)
        self.identity = self._tower.identity
        self.alone_matters = self._family.alone_matters
        self.pids: list[int] = []

    @property
    def input(self) -> ImageInput:
        return self._family

    async def start(self) -> None: ...

    async def encode(self, image: Media, alone: bool = True, timeout: float | None = None) -> Encoded:
        assert image.pixels is not None
        prepared = self._family.prepare(image.pixels, image.detail, alone)
        output = self._tower.run(prepared)
        return Encoded(prepared.grid, output.rows, output.added)

    async def stop(self) -> None: ...

    def kill(self) -> None: ...


async def refuse(url: str) -> bytes:
    raise AssertionError(url)


async def generated(opened: Opened, requests: list[tuple[str, list[Any]]]) -> list[tuple[int, list[int]]]:
    """The prompt's length and the greedy tokens of each request, all asked together."""
    config = GeneratorConfig.of(opened.path, dtype="float32", kv_cache_bytes=8 << 20)
    vision = VisionService(Inside(opened), VisionConfig(), refuse)
    engine = Engine(config, load_tokenizer(opened.path), LocalExecutor(ShardJob.of(config)), vision=vision)
    await engine.start()
    try:

        async def ask(prompt: str, images: list[Any]) -> tuple[int, list[int]]:
            media = tuple(Media(pixels=image) for image in images)
            request = GenerationRequest(
                prompt, Sampling(), COUNT, ignore_eos=True, add_special_tokens=False, media=media
            )
            length, tokens = 0, []
            async for event in engine.generate(request):
                if isinstance(event, Start):
                    length = event.prompt_length
                elif isinstance(event, Token):
                    tokens.append(event.info.id)
            return length, tokens

        return list(await asyncio.gather(*(ask(*request) for request in requests)))
    finally:
        await engine.stop()


def said(opened: Opened, prompt: str, images: list[Any]) -> tuple[int, list[int]]:
    """As `generated`, by transformers' model, its image processor and the family's text."""
    from tokenizers import Tokenizer

    family, kind = opened.family, opened.kind
    alone = len(images) == 1
    texts = [family.text(family.grid(image.shape[0], image.shape[1], alone=alone)) for image in images]
    parts = prompt.split(family.placeholder)
    whole = "".join(part + text for part, text in zip(parts, [*texts, ""]))
    tokens = Tokenizer.from_file(str(opened.path / "tokenizer.json")).encode(whole, add_special_tokens=False).ids
    inputs = opened.processed(*images) if images else {}
    found: list[int] = []
    with torch.inference_mode():
        for _ in range(COUNT):
            ids = torch.tensor([[*tokens, *found]])
            kinds = {KINDS[kind]: (ids == family.token_id).int()} if kind in KINDS else {}
            found.append(int(opened.model(ids, **inputs, **kinds, use_cache=False).logits[0, -1].argmax()))
    return len(tokens), found


@pytest.mark.parametrize("kind", list(MAKERS))
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Two pictures with text between, one picture, and text alone, beside each other."""
    opened = Opened(kind, tmp_path / kind)
    mark = opened.family.placeholder
    requests: list[tuple[str, list[Any]]] = [
        (f"See {mark} and then {mark} what is it", [picture(40, 61), picture(64, 25, 1)]),
        (f"{mark}What is it", [picture(97, 101, 2)]),
        ("No picture at all", []),
    ]
    wanted = [said(opened, *request) for request in requests]
    assert asyncio.run(asyncio.wait_for(generated(opened, requests), 60)) == wanted
    assert wanted[0][0] > sum(opened.family.runs(opened.family.grid(40, 61, alone=False)))
