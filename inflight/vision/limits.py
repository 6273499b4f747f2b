"""What an image may be, whoever looks at it. Errors name the image's own numbers and the option of the limit."""

from __future__ import annotations

from inflight.errors import InvalidRequest

MAX_RATIO = 200
"""Longer side by shorter side; beyond it Qwen's processors raise an error, and no family makes sense of the image."""


def check_bytes(size: int, most: int) -> None:
    """
    Raises:
        InvalidRequest: a file of `size` bytes is too large.
    """
    if size > most:
        raise InvalidRequest(f"Image size {size} bytes exceeds maximum allowed size of {most} bytes")


def check_sides(width: int, height: int, most_pixels: int) -> None:
    """
    Raises:
        InvalidRequest: an image of these sides cannot be read.
    """
    if width < 1 or height < 1:
        raise InvalidRequest(f"invalid image: it has {width} x {height} pixels")
    if width * height > most_pixels:
        raise InvalidRequest(
            f"invalid image: it has {width} x {height} = {width * height} pixels; at most {most_pixels} are read "
            "(--image-max-pixels)"
        )
    check_ratio(height, width)


def check_ratio(height: int, width: int) -> None:
    """
    Raises:
        InvalidRequest: one side of an image is too long for the other.
    """
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidRequest(
            f"invalid image: it has {width} x {height} pixels; one side may be {MAX_RATIO} times the other at most"
        )
