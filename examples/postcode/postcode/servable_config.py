"""Reads the postcode on a page: a detector finds the digits, and a model that reads images describes each of them."""

import io
import re

import numpy as np
from PIL import Image

from inflight.servable import add_stage, declare_generator, declare_model, register_method

DIGITS = 4
HEIGHT, WIDTH, CELL = 96, 384, 4

detector = declare_model("detector.onnx", "onnx", max_batch_size=16)
pocket = declare_generator("../../../models/pocket_vision", kv_cache_memory=16 << 20, max_total_tokens=256)


def decode(page):
    """The page's pixels, uint8 [96, 384, 3], and its ink, float32 [1, 96, 384], 0 to 1."""
    picture = Image.open(io.BytesIO(page.tobytes())).convert("RGB").resize((WIDTH, HEIGHT))
    return np.asarray(picture), 1 - np.asarray(picture.convert("L"), np.float32)[np.newaxis] / 255


def cut(pixels, score):
    """The question, and the digits from left to right, each with some of the page around it."""
    found = score[0] > 0.5
    inside = np.flatnonzero(np.diff(np.concatenate([[False], found.any(axis=0), [False]]).astype(np.int8)))
    if len(inside) != 2 * DIGITS:
        raise ValueError(f"the page has {len(inside) // 2} digits, and a postcode has {DIGITS}")
    crops = []
    for left, right in inside.reshape(DIGITS, 2):
        rows = np.flatnonzero(found[:, left:right].any(axis=1))
        crops.append(square(pixels, CELL * left, CELL * rows[0], CELL * right, CELL * (rows[-1] + 1)))
    return ("Describe the image.", *crops)


def square(pixels, left, top, right, bottom):
    """What lies in a box, in the middle of a square of the page's own colour."""
    side = max(right - left, bottom - top) * 5 // 4
    whole = np.empty((side, side, 3), np.uint8)
    whole[:] = np.median(pixels, axis=(0, 1))
    down, across = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    whole[down : down + bottom - top, across : across + right - left] = pixels[top:bottom, left:right]
    return whole


def join(first, second, third, fourth):
    texts = (first, second, third, fourth)
    digits = [re.search(r"digit (\d)", text) for text in texts]
    return "".join(digit[1] if digit else "?" for digit in digits), "\n".join(texts)


@register_method(output_names=("postcode", "descriptions"))
def read(page):
    pixels, ink = add_stage(decode, page, outputs_count=2)
    score = add_stage(detector, ink, outputs_count=1)
    question, *crops = add_stage(cut, pixels, score, outputs_count=1 + DIGITS)
    texts = [add_stage(pocket, question, crop, outputs_count=1) for crop in crops]
    return add_stage(join, *texts, outputs_count=2)
