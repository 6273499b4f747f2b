"""Files of images into RGB pixels. Runs in the vision worker only, which has a limit of memory and may die of what it
reads; the server never looks into a file.

What is decided here is part of what a model sees: the first frame, EXIF's orientation, transparency on white, 8 bits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from inflight.errors import InvalidRequest, describe
from inflight.vision.limits import check_sides

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may try. It reads some forty more, among them FITS, EPS and PSD, whose readers have been attacked."""
WHITE = (255, 255, 255, 255)
ORIENTATION = 0x0112
"""EXIF's tag."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each orientation upright (EXIF 2.3, 4.6.4)."""
TEXT = 200
"""Characters of Pillow's texts that are passed on."""


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The first frame of a file, upright.

    Args:
        data: PNG, JPEG, WebP, GIF, BMP or TIFF; told by its bytes.
        max_pixels: width times height; larger images are refused by their header, before anything is decoded.

    Returns:
        uint8 [height, width, 3], RGB, C-contiguous.

    Raises:
        InvalidRequest: whatever is wrong with it, in TGI's words.
    """
    # Pillow also checks the frame of a GIF, for which it takes memory while it opens the file. It warns above this
    # number and refuses above twice as much.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            check_sides(width, height, max_pixels)
            image.load()
            return np.ascontiguousarray(_rgb(_upright(image)))
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        raise InvalidRequest(
            "invalid image: The image format could not be determined; PNG, JPEG, WebP, GIF, BMP and TIFF are read"
        ) from None
    except Image.DecompressionBombError:
        raise InvalidRequest(
            f"invalid image: it has more than {max_pixels} pixels, which are read at most (--image-max-pixels)"
        ) from None
    except MemoryError:
        raise InvalidRequest("invalid image: decoding it takes too much memory") from None
    except Exception as error:  # a decoder may raise anything on bytes that somebody made for it
        raise InvalidRequest(f"invalid image: {describe(error)[:TEXT]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of damage that it reads over; a client's picture is no matter for the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION)
        turn = UPRIGHT.get(orientation)
    except Exception:  # a damaged EXIF says nothing; the picture may be sound
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.info = image.info  # what is transparent
    return upright


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith(("I", "F")):
        grey = _eight_bits(image)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return np.asarray(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Grey levels of 16 or 32 bits, or floats, as 8 bits. Files do not say what is white: it is the end of the smallest
    usual range that holds all values. Of 16 bits the upper half is kept, as Pillow does where there are colours."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return (values.astype(np.uint16) >> 8).astype(np.uint8)
    levels: NDArray[np.float32] = np.nan_to_num(values.astype(np.float32), nan=0.0)
    most = float(levels.max(initial=0.0))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    white = next((end for end in ranges if most <= end), most)
    levels /= np.float32(white)
    np.clip(levels, 0.0, 1.0, out=levels)
    levels *= np.float32(255.0)
    return np.rint(levels, out=levels).astype(np.uint8)
