"""Damaged pictures and addresses, one after the other: each is read or refused with a typed error, in bounded time and
memory. `python -m tests.fuzz_images 100000` runs 100,000 of each."""

from __future__ import annotations

import base64
import io
import random
import resource
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, features

from inflight.contract import media_at
from inflight.errors import InvalidRequest
from inflight.vision.decode import decode
from inflight.vision.fetch import read_url

MAX_PIXELS = 1_000_000
EXTREMES = (0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Counts:
    """Attributes:
    slowest: seconds of one input.
    grown: bytes by which the process has become larger at its largest.
    """

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    grown: int = 0

    @property
    def total(self) -> int:
        return self.read + self.refused


def seeds() -> list[bytes]:
    """Sound files of every format, in modes that differ in what decodes them."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    rgba = Image.fromarray(noise)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((image, "PNG", {}) for image in (rgba, rgb, grey, grey.convert("1"), rgb.quantize(8), rgba.convert("LA"))),
        (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (Image.fromarray(noise.view(np.uint16)[:, :, 0].copy()), "PNG", {}),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgba.convert("CMYK"), "JPEG", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        (rgb.quantize(16), "GIF", {"transparency": 1}),
        (rgb, "BMP", {}),
        (grey.convert("1"), "BMP", {}),
        *((rgb, "TIFF", {"compression": name}) for name in ("raw", "packbits")),
        (Image.fromarray(noise.view(np.float32)[:, :, 0].copy()), "TIFF", {}),
    ]
    if features.check("libtiff"):
        forms += [(rgb, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    if features.check("webp"):
        forms += [(rgba, "WEBP", {"lossless": True}), (rgb, "WEBP", {"save_all": True, "append_images": [rgb]})]
    files = []
    for image, format, options in forms:
        file = io.BytesIO()
        image.save(file, format, **options)
        files.append(file.getvalue())
    return files


def damaged(draw: random.Random, files: list[bytes]) -> bytes:
    """One of the files with bytes changed, cut, repeated, or mixed with another's."""
    data = bytearray(draw.choice(files))
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                form = draw.choice(("<I", ">I", "<H", ">H", "B"))
                size = struct.calcsize(form)
                data[at : at + size] = struct.pack(form, draw.choice(EXTREMES) & ((1 << 8 * size) - 1))
            case 2:
                del data[at : at + draw.randrange(40)]
            case 3:
                data[at:at] = data[at : at + draw.randrange(200)]
            case 4:
                other = draw.choice(files)
                data[at:] = other[draw.randrange(len(other)) :]
            case _:
                data[at:at] = draw.randbytes(draw.randrange(8))
        if not data:
            break
    return resealed(bytes(data)) if draw.random() < 0.5 else bytes(data)


def resealed(data: bytes) -> bytes:
    """A PNG with the checksums that its damaged chunks should have, so that they are looked into."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + size]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join(parts) + data[at:]


def address(draw: random.Random, data: bytes) -> str:
    """A `data:` or http address, mostly damaged."""
    if draw.random() < 0.5:
        text = f"data:image/png;base64,{base64.b64encode(data[: draw.randrange(1, 400)]).decode()}"
    else:
        text = "http://user.example:80/a/b?c=d"
    pieces = [
        "data:",
        ";",
        "base64,",
        "=",
        "@",
        ":",
        "//",
        "[::1]",
        "%00",
        "\\",
        "\r\n",
        "\0",
        "ä",
        "\ud800",
        "①",
        "http",
    ]
    chars = list(text)
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(chars) + 1)
        chars[at : at + draw.randrange(3)] = draw.choice(pieces)
    return "".join(chars)


def fuzz(count: int, seed: int = 0) -> Counts:
    """Reads `count` damaged files and as many addresses. Raises whatever is no `InvalidRequest`."""
    draw = random.Random(seed)
    files = seeds()
    for file in files:
        decode(file, MAX_PIXELS)
    counts = Counts()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        data = damaged(draw, files)
        began = time.process_time()
        try:
            pixels = decode(data, MAX_PIXELS)
        except InvalidRequest as error:
            check(error, "invalid image: ")
            counts.refused += 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            assert 0 < pixels.size <= 3 * MAX_PIXELS
            counts.read += 1
        counts.slowest = max(counts.slowest, time.process_time() - began)
        text = address(draw, data)
        for read in (media_at, read_url):
            try:
                read(text)
            except InvalidRequest as error:
                check(error)
    counts.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return counts


def check(error: InvalidRequest, begin: str = "") -> None:
    """An error's text can be sent, and is short."""
    text = str(error)
    assert text.startswith(begin)
    assert len(text.encode()) < 1000


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
