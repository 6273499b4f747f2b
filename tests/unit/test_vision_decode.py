"""Files of images: what is read of them, and what is refused before it costs anything."""

from __future__ import annotations

import io
import random
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from inflight.errors import InvalidRequest
from inflight.vision.decode import decode
from tests.fuzz_images import fuzz

LIMIT = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(width: int = 7, height: int = 5) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def of(data: bytes) -> NDArray[np.uint8]:
    pixels = decode(data, LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    return pixels


def refused(data: bytes, limit: int = LIMIT) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(data, limit)
    return str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_read_by_what_its_bytes_say(format: str) -> None:
    image = picture()
    pixels = of(saved(image, format, **({"lossless": True} if format == "WEBP" else {})))
    assert pixels.shape == (5, 7, 3)
    if format not in ("JPEG", "GIF"):
        assert np.array_equal(pixels, np.asarray(image))


def test_one_pixel_is_an_image() -> None:
    assert of(saved(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_pictures_come_upright(orientation: int, format: str) -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = of(saved(image, format, exif=exif, **options))
    upright = np.asarray(image)
    # What each says of the stored first row and first column (EXIF 2.3): 6 means right and top, and so on.
    turned = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright),
    }.get(orientation, upright)
    assert np.array_equal(pixels, turned)


def test_a_damaged_exif_leaves_the_picture_as_it_is() -> None:
    image = picture()
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(20),
        b"noise",
    ):
        assert of(saved(image, "JPEG", exif=exif)).shape == (5, 7, 3)


def test_what_is_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        assert of(saved(clear, format, **options)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert of(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).tolist() == [[[127, 127, 127]]]
    assert of(saved(Image.new("LA", (1, 1), (0, 0)))).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        assert of(saved(palette, format, transparency=0)).tolist() == [[[255, 255, 255], [9, 9, 9]]]
    assert of(saved(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))).tolist() == [[[255, 255, 255]]]
    assert of(saved(Image.new("L", (1, 1), 7), transparency=7)).tolist() == [[[255, 255, 255]]]


def test_other_modes_become_rgb_of_8_bits() -> None:
    assert of(saved(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert of(saved(Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert of(saved(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "JPEG")).tolist() == [[[255] * 3]]
    assert of(saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).tolist() == [[[255, 0, 0]]]
    wide = Image.fromarray(np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16))
    for format in ("PNG", "TIFF"):
        assert of(saved(wide, format))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    for values, levels in (
        ([0.0, 0.5, 1.0, -3.0, float("nan")], [0, 128, 255, 0, 0]),
        ([0.0, 51.0, 255.0, -1.0, 1.0], [0, 51, 255, 0, 1]),
        ([0.0, 65535.0, 32768.0, 0.0, 0.0], [0, 255, 128, 0, 0]),
        ([0.0, 2e6, 1e6, 0.0, 0.0], [0, 255, 128, 0, 0]),
        ([0.0] * 5, [0] * 5),
    ):
        floats = Image.fromarray(np.array([values], np.float32))
        assert of(saved(floats, "TIFF"))[0, :, 0].tolist() == levels
    whole = Image.fromarray(np.array([[0, 255, 100]], np.int32))
    assert of(saved(whole, "TIFF"))[0, :, 0].tolist() == [0, 255, 100]


def test_the_first_frame_is_the_image() -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert of(data).reshape(-1, 3).tolist() == [[255, 0, 0]] * 6


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def bomb(side: int) -> bytes:
    """A sound PNG of `side` x `side` zeros, a thousand times smaller than its pixels."""
    row = bytes(1 + 3 * side)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png_header(side, side) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@contextmanager
def little_memory(more: int = 64 << 20) -> Iterator[None]:
    """Lets the process take so much more memory, and no more."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("only Linux limits memory by what a process holds")
    held = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def gif(screen: int, frame: int, dispose: int = 0) -> bytes:
    """A GIF whose frame has not the screen's size; `dispose`: what becomes of the frame when the next one comes."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    control = b"!\xf9\x04" + bytes([dispose << 2]) + bytes(4)
    return head + control + b"," + struct.pack("<HHHHBB", 0, 0, frame, frame, 0, 2) + b"\x02\x84\x51\x00;"


def test_bombs_are_refused_by_their_headers() -> None:
    bmp = bytearray(saved(Image.new("RGB", (1, 1)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    png = png_header(60000, 60000) + chunk(b"IDAT", b"x")
    for data in (png, gif(60000, 2), gif(2, 60000), gif(2, 60000, 2), gif(60000, 60000, 3), bytes(bmp)):
        with little_memory():
            text = refused(data)
        assert text == "invalid image: it has more than 50000000 pixels, which are read at most (--image-max-pixels)"
    with little_memory():
        text = refused(png_header(10000, 6000) + chunk(b"IDAT", b"x"))
    assert text.startswith("invalid image: it has 10000 x 6000 = 60000000 pixels; at most 50000000 are read")


def test_what_takes_too_much_memory_is_refused() -> None:
    with little_memory():
        text = refused(bomb(5000), 100_000_000)
    assert text == "invalid image: decoding it takes too much memory"


def test_a_small_bomb_is_a_picture() -> None:
    data = bomb(300)
    assert len(data) < 2000
    assert of(data).shape == (300, 300, 3)
    assert "300 x 300 = 90000 pixels" in refused(data, 89_999)
    assert "--image-max-pixels" in refused(data, 89_999)


def test_an_animation_of_many_frames_costs_its_first() -> None:
    """A GIF of 10^5 frames."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + bytes([255, 0, 0, 0, 0, 0])
    frame = b"," + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\x02\x02\x84\x51\x00"
    assert of(head + frame * 100_000 + b";").shape == (2, 2, 3)


def test_odd_sides_are_refused() -> None:
    assert "it has 0 x 5 pixels" in refused(png_header(0, 5)) or "invalid image" in refused(png_header(0, 5))
    assert of(saved(Image.new("RGB", (200, 1)))).shape == (1, 200, 3)
    for size in ((201, 1), (1, 201), (2011, 10)):
        assert "one side may be 200 times the other at most" in refused(saved(Image.new("RGB", size)))


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_cut_off_is_refused(format: str) -> None:
    data = saved(picture(64, 64), format)
    for size in (0, 1, 4, 12, 30, len(data) // 2, len(data) - len(data) // 4):
        assert refused(data[:size]).startswith("invalid image: ")


def test_other_formats_are_not_tried() -> None:
    fits = b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  =                    8" + b" " * 2800
    eps = saved(picture(), "EPS")
    others = [
        saved(picture(), format) for format in ("PPM", "TGA", "ICO", "PCX", "DDS", "SGI", "PDF", "JPEG2000", "AVIF")
    ]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    psd = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(100)
    for data in (fits, eps, svg, psd, b"%PDF-1.4\n", b"<html></html>", b"", b"\0" * 1000, *others):
        assert refused(data).startswith("invalid image: The image format could not be determined")


def test_damaged_files_are_read_or_refused() -> None:
    """`python -m tests.fuzz_images 100000` does the same for longer."""
    counts = fuzz(2000, seed=1)
    assert counts.total == 2000
    assert counts.read > 100
    assert counts.refused > 100
    assert counts.grown < 200_000_000


def test_texts_say_nothing_of_this_machine() -> None:
    draw = random.Random(5)
    for _ in range(50):
        text = refused(draw.randbytes(60))
        assert "object at 0x" not in text
        assert "/" not in text
