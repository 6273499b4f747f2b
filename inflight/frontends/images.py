"""Images in JSON: the keys and forms in which an instance of a request holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from inflight.contract import (
    Detail,
    GeneratorInfo,
    Media,
    Value,
    images_in,
    is_address,
    read_base64,
    read_detail,
    text_only,
)
from inflight.errors import InvalidRequest
from inflight.frontends.json_values import value_of

KEYS = ("image", "images", "image_url")
"""One image; a list of images; an image by its address, also as `{"url": ...}`."""
_NEAR = ("image_urls", "pixel_values")
"""Further names that clients give images."""
_PIXELS = np.dtype(np.uint8)
_FORMS = (
    'write {"b64": "<a file in base64>"}, a text that begins with data:, http: or https:, or pixels as {"b64": ..., '
    '"type": "uint8", "shape": [<height>, <width>, 3]}'
)


def split_images(fields: Mapping[str, Any], where: str, info: GeneratorInfo) -> tuple[dict[str, Any], list[Media]]:
    """The fields of an instance without its images, and the images.

    Args:
        where: what the instance is called in an error's text.

    Raises:
        InvalidRequest: the model reads text only, or an image has none of the forms.
    """
    present = {name: value for name, value in fields.items() if value is not None or name not in KEYS}
    looks = [
        name for name, value in present.items() if name in KEYS + _NEAR or (type(value) is dict and "b64" in value)
    ]
    if not looks:
        return present, []
    if info.image_placeholder is None:
        raise text_only(info.name)
    wrong = next((name for name in looks if name not in KEYS), None)
    if wrong is not None:
        raise InvalidRequest(f"{where}: '{wrong}' is no key of an image; use 'image', 'images' (a list) or 'image_url'")
    media: list[Media] = []
    for key in KEYS:
        if key in present:
            given = present[key] if key == "images" else [present[key]]
            if type(given) is dict:
                given = [given]
            if type(given) is not list:
                raise InvalidRequest(f"{where}: 'images' must be a list of images; {_FORMS}")
            for one in given:
                media += _read(one, f"{where}: '{key}'")
    return {name: value for name, value in present.items() if name not in KEYS}, media


def image_of(data: bytes) -> Value:
    """The image of one element of a binary tensor: bytes of a file, the same in base64, or an address."""
    if not data.isascii():
        return data
    text = data.decode().strip()
    if is_address(text):
        return text
    try:
        return read_base64("".join(text.split()))
    except InvalidRequest:
        return data  # what it is, its decoder says


def value_of_image(media: Media) -> Value:
    """An image as a value of a row."""
    return next(each for each in (media.data, media.pixels, media.url) if each is not None)


def _read(given: Any, where: str) -> list[Media]:
    """The images of one JSON value; pixels may be several."""
    detail: Detail = "auto"
    if type(given) is dict and "url" in given:
        given, detail = given["url"], read_detail(given, where)
    if type(given) is not list and type(given) is not dict and not (type(given) is str and is_address(given)):
        raise InvalidRequest(f"{where} has no image; {_FORMS}")
    try:
        value: Value = value_of(given, _PIXELS)
        if isinstance(value, str) and not is_address(value):
            raise InvalidRequest(_FORMS)
        return images_in(value, detail)
    except InvalidRequest as error:
        raise type(error)(f"{where}: {error}") from None
