"""Reads the images that clients and stages give, and puts their places into prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from inflight.contract.data_uri import FETCHED, media_at
from inflight.contract.generation import Chat, GenerationRequest, Generator, GeneratorInfo
from inflight.contract.media import Detail, Media
from inflight.contract.values import Array, MethodInfo, Texts, Value
from inflight.errors import InvalidRequest

IMAGE = "image"
"""The input of images in the method `generate` of a model that reads them."""
EXAMPLE = "HuggingFaceTB/SmolVLM-256M-Instruct"
"""A model that reads images, for the text of an error."""

_MARKDOWN = re.compile(r"!\[\]\(([^)]*)\)")
"""An image in a text, as TGI reads it (validation.rs): without a description, up to the first `)`."""
_SHOWN = 80
_COLOURS = (1, 3)


def text_only(name: str) -> InvalidRequest:
    """The error of a request with images to a model that reads none. Args: name: the model's."""
    return InvalidRequest(
        f"model '{name}' reads text only; it has no image input (serve a vision checkpoint, e.g. {EXAMPLE}; beside a "
        "GGUF file put its mmproj-*.gguf)"
    )


def reads_images(method: MethodInfo) -> bool:
    """Whether a language model's method `generate` takes images."""
    return bool(method.optional) and method.inputs[-1].name == IMAGE


def is_address(text: str) -> bool:
    """Whether a text is an image by its address: `data:`, `http:`, `https:` or `file:`."""
    return text[:6].lower().startswith(("data:", *FETCHED))


def images_in(value: Value, detail: Detail = "auto") -> list[Media]:
    """The images of one value.

    Args:
        value: an address; the bytes of a file; pixels, uint8 [height, width, 3], [height, width] (grey), or several
            images [n, height, width, 3]; or a file's bytes as an array, uint8 [size]; or several addresses, or files.

    Raises:
        InvalidRequest: it is none of these.
    """
    if isinstance(value, str):
        return [media_at(value, detail)]
    if isinstance(value, np.ndarray):
        return _pictures(value, detail)
    if isinstance(value, Texts):
        return [image for item in value.items for image in images_in(item, detail)]
    return [_file(bytes(value), detail)]


def image_at(given: Any, where: str) -> Media:
    """The image of OpenAI's `image_url`: `{"url": ..., "detail": ...}`, or the address alone.

    Args:
        where: the content part's place, for the text of an error.

    Raises:
        InvalidRequest: the address or the detail is wrong, or missing.
    """
    detail: Detail = "auto"
    if isinstance(given, Mapping):
        detail, given = read_detail(given, where), given.get("url")
    if not isinstance(given, str):
        raise InvalidRequest(f'`{where}` has no image; write {{"type": "image_url", "image_url": {{"url": "..."}}}}')
    return media_at(given, detail)


def read_detail(given: Mapping[str, Any], where: str) -> Detail:
    """How finely an image is to be read.

    Raises:
        InvalidRequest: an unknown word.
    """
    detail = given.get("detail")
    if detail not in (None, *get_args(Detail)):
        raise InvalidRequest(f"{where}: 'detail' must be one of {', '.join(get_args(Detail))}")
    return detail or "auto"


def _file(data: bytes, detail: Detail) -> Media:
    if not data:
        raise InvalidRequest("the image is empty")
    return Media(data=data, detail=detail)


def _pictures(array: Array, detail: Detail) -> list[Media]:
    if array.dtype != np.uint8:
        raise InvalidRequest(f"an image's pixels must be uint8, 0 to 255, and these are {array.dtype}; convert them")
    if array.ndim == 1:
        return [_file(array.tobytes(), detail)]
    pixels = array[..., np.newaxis] if array.ndim == 2 else array
    if pixels.ndim not in (3, 4) or pixels.shape[-1] not in _COLOURS or 0 in pixels.shape:
        raise InvalidRequest(
            f"an image's pixels must have the shape [height, width, 3], or [n, height, width, 3] for several images, "
            f"and these have {list(array.shape)}"
        )
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    several = pixels if pixels.ndim == 4 else pixels[np.newaxis]
    return [Media(pixels=np.ascontiguousarray(each), detail=detail) for each in several]


def from_markdown(text: str, info: GeneratorInfo) -> tuple[str, tuple[Media, ...]]:
    """A text with `![](<address>)` in it as a prompt and its images, as TGI does it. A model that reads text only gets
    the text unchanged.

    Raises:
        InvalidRequest: an address is none of an image's.
    """
    mark = info.image_placeholder
    if mark is None or "![](" not in text:
        return text, ()
    media: list[Media] = []

    def read(found: re.Match[str]) -> str:
        if not is_address(found[1]):
            raise InvalidRequest(f"invalid image content: {found[0][:_SHOWN]}")
        media.append(media_at(found[1]))
        return mark

    return _MARKDOWN.sub(read, text), tuple(media)


def from_messages(
    messages: Sequence[dict[str, Any]], info: GeneratorInfo, read: Callable[[dict[str, Any], str], Media | None]
) -> tuple[list[dict[str, Any]], tuple[Media, ...]]:
    """A conversation as a chat template takes it (`Chat.messages`), and its images in order.

    Args:
        read: the image of a content part; None: the part is none. Its second argument is the part's place, for the
            text of an error.

    Raises:
        InvalidRequest: there is an image, and the model reads text only.
    """
    media: list[Media] = []

    def shown(part: Any, where: str) -> Any:
        image = read(part, where) if isinstance(part, dict) else None
        if image is None:
            return part
        if info.image_placeholder is None:
            raise text_only(info.name)
        media.append(image)
        return {"type": "image"}

    found = []
    for index, message in enumerate(messages):
        parts = message.get("content")
        if isinstance(parts, list):
            where = f"messages[{index}].content"
            message = {**message, "content": [shown(part, f"{where}[{at}]") for at, part in enumerate(parts)]}
        found.append(message)
    return found, tuple(media)


async def with_images(generator: Generator, request: GenerationRequest, media: Sequence[Media]) -> GenerationRequest:
    """A request with images. Their places are the placeholders in its prompt; without any they come before the text,
    in one turn of the user's if the model has a chat template. Without a text the model's default one is asked.

    Raises:
        InvalidRequest: the model reads text only.
    """
    info = generator.info
    text, mark = request.prompt, info.image_placeholder
    if not media:
        return request
    if mark is None:
        raise text_only(info.name)
    request = replace(request, media=tuple(media))
    if not isinstance(text, str) or mark in text:
        return request  # the engine checks that the places are as many as the images
    text = text or info.vision.default_image_prompt
    if not info.has_template:
        return replace(request, prompt=f"{mark * len(media)}\n{text}")
    content: list[object] = [*({"type": "image"} for _ in media), {"type": "text", "text": text}]
    prompt = await generator.render(Chat([{"role": "user", "content": content}]))
    return replace(request, prompt=prompt, add_special_tokens=False)
