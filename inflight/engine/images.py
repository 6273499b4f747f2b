"""Images of prompts: has them encoded, writes the family's markers in their places, finds their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from inflight.contract import (
    EncodedImage,
    GenerationRequest,
    ImageInput,
    Media,
    SeenImage,
    Span,
    Vision,
    text_only,
)
from inflight.errors import DeadlineExceeded, InvalidRequest, ModelError

T = TypeVar("T")


class Prompt(NamedTuple):
    """An encoded prompt.

    Attributes:
        spans: of its images, by position.
        images: of the request; the keys of those without rows are in the prefix cache.
        media: the images with the bytes of their files.
        second: index of the first token of a pair's second text whose type is 1; 0: there is none.
    """

    tokens: list[int]
    spans: tuple[Span, ...] = ()
    images: tuple[EncodedImage | SeenImage, ...] = ()
    media: tuple[Media, ...] = ()
    second: int = 0


class Images:
    """The images of one model's prompts.

    Args:
        name: the model's name.
        vision: encodes images; None: the model reads text only.

    Attributes:
        waiting: requests whose images are being encoded.
    """

    def __init__(self, name: str, vision: Vision | None) -> None:
        self._name = name
        self._vision = vision
        self.waiting = 0

    @property
    def input(self) -> ImageInput | None:
        """How images are written into prompts; None: the model reads text only."""
        return self._vision.input if self._vision is not None else None

    @property
    def step(self) -> int:
        """Tokens of an image that one step has to compute together; 0: steps may cut images anywhere."""
        return self.input.together if self.input is not None else 0

    def check(self, request: GenerationRequest) -> None:
        """Checks a request before its images are encoded.

        Raises:
            InvalidRequest: the model or the kind of request takes no images, or they are not what the prompt says.
        """
        input, count = self.input, len(request.media)
        if input is None:
            if count:
                raise text_only(self._name)
            return
        if count and request.embed:
            raise InvalidRequest("images cannot be embedded; send texts only")
        if not isinstance(request.prompt, str):
            if count:
                raise InvalidRequest("a prompt of token ids cannot have images; send it as a text")
            return
        places = request.prompt.count(input.placeholder)
        if places != count:
            raise InvalidRequest(
                f"the prompt has {places} places for images (`{input.placeholder}`), and the request has {count} "
                f"images; write `{input.placeholder}` once for each image and nowhere else"
            )

    async def fetched(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the files of its images in place of their addresses.

        Raises:
            InvalidRequest: an image cannot be fetched.
            Overloaded: too many images wait.
            DeadlineExceeded: they took longer than the request's timeout.
        """
        if all(image.url is None for image in request.media):
            return request
        assert self._vision is not None
        return replace(request, media=await self._waited(self._vision.fetched(request.media), request.timeout))

    async def encode(self, request: GenerationRequest) -> tuple[EncodedImage, ...]:
        """The request's images, encoded. Cancelling the call gives them up.

        Raises:
            InvalidRequest: an image cannot be fetched or read.
            Overloaded: too many images wait.
            DeadlineExceeded: they took longer than the request's timeout.
        """
        if not request.media:
            return ()
        assert self._vision is not None
        return tuple(await self._waited(self._vision.encode(request.media, request.tenant), request.timeout))

    async def wanted(self, request: GenerationRequest) -> tuple[EncodedImage | SeenImage, ...]:
        """The request's images: encoded, but for those whose rows were known once and are not kept. Raises as `encode`.

        A prompt whose tokens are all computed, because their log-probabilities are asked for, needs all rows.
        """
        if not request.media or request.sampling.needs_whole_prompt:
            return await self.encode(request)
        assert self._vision is not None
        seen = await self._vision.seen(request.media, request.tenant)
        new = [image for image, known in zip(request.media, seen) if known is None]
        rows: list[EncodedImage] = []
        if new:
            rows = await self._waited(self._vision.encode(new, request.tenant, len(seen) == 1), request.timeout)
        encoded = iter(rows)
        return tuple(next(encoded) if known is None else known for known in seen)

    async def _waited(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        working = asyncio.ensure_future(work)
        self.waiting += 1
        try:
            # Not `wait_for`, which drops a cancellation that comes together with its result before Python 3.12.
            await asyncio.wait([working], timeout=timeout)
            if not working.done():
                raise DeadlineExceeded(f"the generation took longer than its {timeout:g} seconds")
            return working.result()
        finally:
            self.waiting -= 1
            if not working.done():
                working.cancel()

    def skipped(self, images: Items[EncodedImage | SeenImage]) -> None:
        """Counts images that were not encoded."""
        assert self._vision is not None
        self._vision.skipped([image for image in images if isinstance(image, SeenImage)])

    def written(self, request: GenerationRequest, images: Items[EncodedImage | SeenImage]) -> GenerationRequest:
        """The request with the family's markers in the places of its images."""
        input = self.input
        assert input is not None
        assert isinstance(request.prompt, str)
        before, *others = request.prompt.split(input.placeholder)
        text = before + "".join(input.text(image.grid) + other for image, other in zip(images, others))
        return replace(request, prompt=text)

    def length(self, images: Items[EncodedImage | SeenImage]) -> int:
        """Tokens that the images become."""
        input = self.input
        return sum(sum(input.runs(image.grid)) for image in images) if input is not None else 0

    def spans(self, tokens: list[int], images: Items[EncodedImage | SeenImage]) -> tuple[Span, ...]:
        """Finds the images' tokens in a prompt that was encoded from `written`.

        Raises:
            InvalidRequest: the prompt has other tokens of images than the images have, because somebody wrote a marker.
            ModelError: an image has not one row for each of its tokens.
        """
        input = self.input
        if input is None:
            return ()
        spans: list[Span] = []
        position = 0
        for index, image in enumerate(images):
            for span in _spans(input, index, image):
                # Runs with nothing between them, of two images, are one run here.
                position = _next(tokens, input.token_id, position)
                if tokens[position : position + span.count].count(input.token_id) != span.count:
                    raise _disordered(input)
                spans.append(replace(span, start=position))
                position += span.count
        if _next(tokens, input.token_id, position) < len(tokens):
            raise _disordered(input)
        return tuple(spans)

    def known(self, tokens: list[int], spans: Items[Span], vocab_size: int) -> list[int]:
        """The prompt with the family's filler in the places of images, or with a token that the model's embedding has
        (0), where the token of images lies outside (Gemma 3). Their embeddings come from the images."""
        if self.input is None or not spans:
            return tokens
        filler = self.input.filler_id
        if filler is None:
            if self.input.token_id < vocab_size:
                return tokens
            filler = 0
        tokens = tokens.copy()
        for span in spans:
            tokens[span.start : span.stop] = [filler] * span.count
        return tokens


def truncated(tokens: list[int], spans: tuple[Span, ...], most: int) -> tuple[list[int], tuple[Span, ...]]:
    """The last `most` tokens of a prompt.

    Raises:
        InvalidRequest: an image would be cut.
    """
    cut = len(tokens) - most if 0 < most < len(tokens) else 0
    if spans and spans[0].start < cut:
        raise InvalidRequest(
            f"`truncate` would cut an image: the prompt has {len(tokens)} tokens, the first image begins at "
            f"{spans[0].start}. Given: {most}; leave `truncate` out, or send fewer or smaller images"
        )
    return tokens[cut:], tuple(replace(span, start=span.start - cut) for span in spans)


def _spans(input: ImageInput, index: int, image: EncodedImage | SeenImage) -> Iterator[Span]:
    """The spans of one image, whose places in the prompt are not known yet.

    Raises:
        ModelError: it has not one row for each of its tokens.
    """
    runs = input.runs(image.grid)
    shape = (sum(runs), input.hidden)
    given = (image.rows, *image.added) if isinstance(image, EncodedImage) else ()
    wrong = next((rows.shape for rows in given if rows.shape != shape), None)
    if wrong is not None:
        raise ModelError(f"an image was encoded as {wrong}, its tokens need {shape}")
    offset = 0
    for count in runs:
        yield Span(0, count, index, offset, image.digest, input.positions(image.grid), input.whole)
        offset += count


def _next(tokens: list[int], token: int, position: int) -> int:
    """The first position of a token from a position on; behind the last token if there is none."""
    try:
        return tokens.index(token, position)
    except ValueError:
        return len(tokens)


def _disordered(input: ImageInput) -> InvalidRequest:
    return InvalidRequest(
        "the text has markers of images that stand for no image of the request; write only "
        f"`{input.placeholder}`, once for each image"
    )
