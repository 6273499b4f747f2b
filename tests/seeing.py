"""A language model that sees, for tests of the doors: it answers with the prompt and the images that came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from inflight.admission import Admission
from inflight.config import VisionConfig
from inflight.contract import (
    Chat,
    Event,
    Finish,
    FinishReason,
    GenerationLimits,
    GenerationRequest,
    GeneratorInfo,
    Media,
    MethodInfo,
    Outcome,
    PieceOfText,
    Row,
    ServableStatus,
    Start,
    Token,
    TokenInfo,
)
from inflight.errors import InflightError, NotFound
from inflight.router.stage import GENERATE, generate_method, run_stage
from inflight.text import ChatTemplate, shown

PLACE = "<image>"
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template of SmolVLM's processor, which takes parts only."""


def told(media: Media) -> str:
    """An image in a few words."""
    what = f"{len(media.data)} bytes" if media.data is not None else media.url
    if media.pixels is not None:
        assert media.pixels.flags.c_contiguous
        what = f"{media.pixels.dtype} {list(media.pixels.shape)} {media.pixels.sum()}"
    return f"{what}, {media.detail}" if media.detail != "auto" else str(what)


class Seeing:
    """A `Generator` whose text is its prompt, `|`, and its images.

    Attributes:
        seen: the requests, in order.
    """

    ready, streams = True, 0

    def __init__(self, name: str, sees: bool = True, template: str | None = SMOLVLM, **vision: Any) -> None:
        self.info = GeneratorInfo(
            name,
            name,
            GenerationLimits.of(GenerationLimits(payload_limit=0), 1000, 2000, sees),
            has_template=template is not None,
            image_placeholder=PLACE if sees else None,
            vision=VisionConfig(**vision),
        )
        self.admission = Admission(8, loop=asyncio.get_event_loop)
        self.seen: list[GenerationRequest] = []
        self._template = None if template is None else ChatTemplate(template)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.seen.append(request)
        text = " + ".join([f"{request.prompt}", *map(told, request.media)])
        yield Start(7)
        yield Token(TokenInfo(5, text), text, last=True)
        yield Finish(FinishReason.LENGTH, text, generated=1, prompt_length=7)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        return []

    async def decode(self, ids: Sequence[int]) -> str:
        return ""

    async def render(self, chat: Chat) -> str:
        assert self._template is not None
        return self._template.render(shown(chat, None), self.info.image_placeholder)


class SeeingBackend:
    """A backend of such models only."""

    live = ready = True

    def __init__(self, *models: Seeing) -> None:
        self.generators = {model.info.name: model for model in models}
        self.unloaded: tuple[str, ...] = ()

    def method(self, servable: str, version: int, method: str) -> MethodInfo:
        if servable not in self.generators or method != GENERATE:
            raise NotFound(f"servable {servable}: method is not available")
        return self.servable(servable)

    def servable(self, name: str) -> MethodInfo:
        return generate_method(name, self.generators[name].info.image_placeholder is not None)

    def servables(self) -> Sequence[ServableStatus]:
        return [ServableStatus(name, 1, (self.servable(name),), True, 1, 1) for name in self.generators]

    def submit(
        self,
        method: MethodInfo,
        rows: Sequence[Row],
        done: Callable[[Any], None],
        *,
        timeout: float | None = None,
        say: Callable[[int, str], None] | None = None,
    ) -> Callable[[], None]:
        model = self.generators[method.servable]
        outcomes: list[Outcome] = [()] * len(rows)
        left = len(rows)

        def settle(index: int, result: Any) -> None:
            nonlocal left
            outcomes[index] = result if isinstance(result, InflightError) else result[0]
            left -= 1
            if not left:
                done(outcomes)

        work = [
            run_stage(model, row, partial(settle, index), partial(say, index) if say else None, reported=method)
            for index, row in enumerate(rows)
        ]
        tasks = [asyncio.ensure_future(one) for one in work]

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        return cancel
