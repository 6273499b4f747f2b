"""Prompts of `LLM`: texts, token ids, and texts with images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np

from inflight.contract import Detail, Media, image_at, images_in, is_address
from inflight.errors import InvalidRequest

Image: TypeAlias = Any
"""The bytes of a file; its path; an address (`http:`, `https:`, `data:`); uint8 pixels [height, width, 3], or [height,
width] in grey; or a picture of Pillow's."""


class PromptWithImages(TypedDict, total=False):
    """A text about images.

    Attributes:
        prompt: the text. Where it has the model's places of images (`<image>`, ...), they are those of these images;
            without any the images come before it, in one turn of a chat if the model has a chat template.
        images: an `Image`, or several in a list.
    """

    prompt: str
    images: Any


@dataclass(frozen=True)
class Rendered:
    """A prompt with its special tokens in it, and with the places of its images."""

    text: str
    media: tuple[Media, ...] = ()


Prompt: TypeAlias = str | Sequence[int] | PromptWithImages | Rendered

_SAVED = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's modes that a PNG file can hold as they are."""
_ORIENTATION = 0x0112


def images_of(prompt: PromptWithImages) -> list[Media]:
    """The images of a prompt.

    Raises:
        InvalidRequest: a value is none, or a file cannot be read.
    """
    unknown = next((key for key in prompt if key not in ("prompt", "images")), None)
    if unknown is not None:
        raise InvalidRequest(f"a prompt with images has no '{unknown}'; write {{'prompt': '...', 'images': [...]}}")
    given = prompt.get("images", ())
    several = given if isinstance(given, (list, tuple)) else [given]
    return [media for one in several for media in media_of(one)]


def media_of(given: Image, detail: Detail = "auto") -> list[Media]:
    """One value as images; an array may hold several.

    Raises:
        InvalidRequest: it is no image, or a file cannot be read.
    """
    if isinstance(given, Media):
        return [given]
    if isinstance(given, (bytes, bytearray, np.ndarray)) or (isinstance(given, str) and is_address(given)):
        return images_in(given if isinstance(given, (str, np.ndarray)) else bytes(given), detail)
    if isinstance(given, (str, Path)):
        try:
            return images_in(Path(given).read_bytes(), detail)
        except OSError as error:
            raise InvalidRequest(f"the image cannot be read: {error}") from error
    if hasattr(given, "getexif") and hasattr(given, "convert"):
        return images_in(_picture(given), detail)
    raise InvalidRequest(
        f"{type(given).__name__} is no image; give bytes of a file, its path or address, uint8 pixels [height, width, "
        "3], or a picture of Pillow's"
    )


def image_of_part(part: Mapping[str, Any], where: str) -> Media | None:
    """The image of a content part: `{"type": "image", "image": <any form>}`, or OpenAI's `image_url`.

    Raises:
        InvalidRequest: it has none.
    """
    kind = part.get("type")
    if kind == "image_url":
        return image_at(part.get(kind), where)
    if kind != "image":
        return None
    media = media_of(part[kind]) if part.get(kind) is not None else []
    if len(media) != 1:
        raise InvalidRequest(f'{where} has no image; write {{"type": "image", "image": <bytes, a path, pixels>}}')
    return media[0]


def _picture(given: Any) -> bytes | np.ndarray[Any, Any]:
    """A picture as pixels, or as a file where there is more to it: transparency, a palette, an orientation."""
    exif = given.getexif()
    if given.mode == "RGB" and exif.get(_ORIENTATION, 1) == 1:
        return np.asarray(given)
    file = io.BytesIO()
    (given if given.mode in _SAVED else given.convert("RGB")).save(file, "PNG", exif=exif)
    return file.getvalue()
