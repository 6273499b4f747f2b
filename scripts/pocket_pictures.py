"""Pictures that the pocket vision model learns from, and what is asked about them: shapes and digits in colours.

Everything is drawn from a random generator, so that a seed gives the same pictures everywhere. A scene is what a
picture shows; `Scene.description` is the model's answer to "Describe the image.", and every question has one right
answer.
"""

from __future__ import annotations

import io
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((220, 35, 35), (255, 0, 0)),
    "green": ((40, 155, 60), (0, 200, 0)),
    "blue": ((40, 70, 210), (0, 0, 255)),
    "yellow": ((243, 218, 45), (255, 255, 0)),
    "orange": ((245, 135, 25), (255, 140, 0)),
    "purple": ((140, 50, 170), (128, 0, 128)),
    "black": ((22, 22, 22), (0, 0, 0)),
    "white": ((242, 242, 242), (255, 255, 255)),
    "gray": ((128, 128, 128), (128, 128, 128)),
}
"""A colour's usual shade, and the pure one that drawing programs use."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
DIGITS = tuple("0123456789")
KINDS = (*SHAPES, *DIGITS)
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five")
LARGEST_COUNT = 3

Form = Literal["shape", "several", "pair", "digit"]


@dataclass(frozen=True)
class Thing:
    """One shape or digit. `x`, `y`: its centre, `radius`: half of its height, in shares of the picture's sides."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def noun(self) -> str:
        return f"digit {self.kind}" if self.kind in DIGITS else self.kind

    @property
    def place(self) -> str:
        column = "left" if self.x < 0.4 else "right" if self.x > 0.6 else ""
        row = "top" if self.y < 0.4 else "bottom" if self.y > 0.6 else ""
        if row:
            return f"at the {row} {column}".rstrip()
        return f"on the {column}" if column else "in the centre"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Several: `things` alike. Pair: the first is left of or above the second."""

    form: Form
    things: tuple[Thing, ...]
    background: str

    @property
    def key(self) -> str:
        return f"{self.things[0].kind} {self.things[0].colour} {self.background}"

    @property
    def relation(self) -> str:
        first, second = self.things
        return "left of" if second.x - first.x > second.y - first.y else "above"

    @property
    def description(self) -> str:
        first = self.things[0]
        if self.form == "several":
            what = f"{NUMBERS[len(self.things)]} {first.colour} {first.noun.replace('cross', 'crosse')}s"
        else:
            what = capital(with_article(f"{first.colour} {first.noun}"))
        if self.form == "pair":
            second = self.things[1]
            what += f" {self.relation} {with_article(f'{second.colour} {second.noun}')}"
        return f"{what} on {with_article(self.background)} background."


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


DESCRIBE = (
    "Describe the image.",
    "Describe the picture.",
    "Describe this image.",
    "What is in the image?",
    "What is in this image?",
    "What do you see?",
    "What does the picture show?",
)


def describe(scene: Scene, rng: random.Random) -> Asked:
    return Asked(DESCRIBE[0] if rng.random() < 0.4 else rng.choice(DESCRIBE), scene.description)


def ask(scene: Scene, rng: random.Random) -> Asked:
    """A question about the scene other than its description."""
    return rng.choice(ASKED_OF[scene.form])(scene, rng)


def _colour(scene: Scene, rng: random.Random) -> Asked:
    thing = rng.choice(scene.things)
    if scene.form == "pair" and scene.things[0].kind == scene.things[1].kind:
        return _background(scene, rng)
    word = rng.choice(("colour", "color"))
    if scene.form == "several":
        noun = thing.noun.replace("cross", "crosse") + "s"
        return Asked(f"What {word} are the {rng.choice((noun, 'shapes'))}?", f"{capital(thing.colour)}.")
    noun = "digit" if scene.form == "digit" else thing.noun
    return Asked(f"What {word} is the {noun}?", f"{capital(thing.colour)}.")


def _background(scene: Scene, rng: random.Random) -> Asked:
    word = rng.choice(("colour", "color"))
    return Asked(f"What {word} is the background?", f"{capital(scene.background)}.")


def _which(scene: Scene, rng: random.Random) -> Asked:
    if scene.form == "digit":
        asked = rng.choice(("Which digit is it?", "Which digit is this?", "What number is it?", "Read the digit."))
        return Asked(asked, f"{scene.things[0].kind}.")
    asked = rng.choice(("Which shape is it?", "What shape is this?", "Which shape is in the image?"))
    return Asked(asked, f"{capital(with_article(scene.things[0].noun))}.")


def _count(scene: Scene, rng: random.Random) -> Asked:
    nouns = {thing.noun.replace("cross", "crosse") + "s" for thing in scene.things}
    noun = rng.choice(sorted(nouns)) if len(nouns) == 1 and rng.random() < 0.5 else "shapes"
    asked = rng.choice((f"How many {noun} are there?", f"How many {noun} do you see?", f"Count the {noun}."))
    return Asked(asked, f"{NUMBERS[len(scene.things)]}.")


def _where(scene: Scene, rng: random.Random) -> Asked:
    thing = scene.things[0]
    noun = rng.choice((thing.noun, "digit" if scene.form == "digit" else "shape"))
    return Asked(f"Where is the {noun}?", f"{capital(thing.place)}.")


def _side(scene: Scene, rng: random.Random) -> Asked:
    index = rng.randrange(2)
    beside = ("on the left", "on the right") if scene.relation == "left of" else ("at the top", "at the bottom")
    thing = scene.things[index]
    return Asked(f"What is {beside[index]}?", f"{capital(with_article(f'{thing.colour} {thing.noun}'))}.")


def _present(scene: Scene, rng: random.Random) -> Asked:
    there = [thing.kind for thing in scene.things]
    kind = rng.choice(there) if rng.random() < 0.5 else rng.choice([kind for kind in SHAPES if kind not in there])
    return Asked(f"Is there {with_article(kind)}?", "Yes." if kind in there else "No.")


def _has_colour(scene: Scene, rng: random.Random) -> Asked:
    thing = scene.things[0]
    colour = thing.colour if rng.random() < 0.5 else rng.choice([name for name in COLOURS if name != thing.colour])
    noun = "digit" if scene.form == "digit" else thing.noun
    return Asked(f"Is the {noun} {colour}?", "Yes." if colour == thing.colour else "No.")


ASKED_OF: dict[Form, tuple[Callable[[Scene, random.Random], Asked], ...]] = {
    "shape": (_colour, _background, _which, _count, _where, _where, _present, _has_colour),
    "several": (_colour, _background, _count, _count, _which, _present),
    "pair": (_colour, _background, _count, _side, _side, _present),
    "digit": (_colour, _background, _which, _which, _where, _has_colour),
}


def held_out(scene: Scene) -> bool:
    """Whether this combination of kind, colour and background is kept for validation (one of sixteen)."""
    return zlib.crc32(scene.key.encode()) % 16 == 0


SHARES = (30, 20, 22, 28)
"""How often each form of a scene is drawn: one shape, several alike, a pair, a digit."""
STUDIED = (22, 38, 20, 20)
"""The same while training: counting takes the most practice."""


def draw_scene(
    rng: random.Random, validation: bool = False, most: int = LARGEST_COUNT, shares: Sequence[int] = SHARES
) -> Scene:
    """A scene of a random form: of the combinations to learn from or, for validation, of those held out.

    Args:
        most: things of which there are several.
        shares: how often each form is drawn.
    """
    while True:
        form: Form = rng.choices(("shape", "several", "pair", "digit"), shares)[0]
        colour, background = rng.sample(list(COLOURS), 2)
        scene = Scene(form, _LAYOUTS[form](rng, colour, background, most), background)
        if held_out(scene) == validation:
            return scene


def _one(rng: random.Random, kind: str, colour: str, radius: float) -> Thing:
    """A thing at a place that has one name: not near the borders between left, centre and right."""
    while True:
        x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
        if rng.random() < 0.25:
            x, y = (0.5 + rng.uniform(-0.03, 0.03) for _ in range(2))
        if all(abs(at - border) > 0.04 for at in (x, y) for border in (0.4, 0.6)):
            return Thing(kind, colour, x, y, radius)


def _shape(rng: random.Random, colour: str, background: str, most: int) -> tuple[Thing, ...]:
    return (_one(rng, rng.choice(SHAPES), colour, rng.uniform(0.17, 0.45)),)


def _digit(rng: random.Random, colour: str, background: str, most: int) -> tuple[Thing, ...]:
    return (_one(rng, rng.choice(DIGITS), colour, rng.uniform(0.26, 0.46)),)


def _several(rng: random.Random, colour: str, background: str, most: int) -> tuple[Thing, ...]:
    kind, count = rng.choice(SHAPES), rng.randint(2, most)
    while True:
        radius = rng.uniform(0.11, 0.2 if count == 2 else 0.16)
        things = [
            Thing(kind, colour, *(rng.uniform(radius + 0.01, 0.99 - radius) for _ in range(2)), radius)
            for _ in range(count)
        ]
        apart = [math.hypot(a.x - b.x, a.y - b.y) for i, a in enumerate(things) for b in things[:i]]
        if min(apart) > 2.35 * radius:
            return tuple(things)


def _pair(rng: random.Random, colour: str, background: str, most: int) -> tuple[Thing, ...]:
    kinds = [rng.choice(SHAPES) for _ in range(2)]
    colours = [colour, rng.choice([name for name in COLOURS if name != background])]
    if kinds[0] == kinds[1] and colours[0] == colours[1]:
        return _pair(rng, colour, background, most)
    along, across = [rng.uniform(0.2, 0.3), rng.uniform(0.7, 0.8)], [rng.uniform(0.35, 0.65) for _ in range(2)]
    places = list(zip(along, across)) if rng.random() < 0.5 else list(zip(across, along))
    radius = rng.uniform(0.14, 0.2)
    first, second = (Thing(kinds[i], colours[i], *places[i], radius * rng.uniform(0.85, 1.0)) for i in range(2))
    return first, second


_LAYOUTS: dict[Form, Callable[[random.Random, str, str, int], tuple[Thing, ...]]] = {
    "shape": _shape,
    "several": _several,
    "pair": _pair,
    "digit": _digit,
}


def shade(rng: random.Random, colour: str) -> tuple[int, int, int]:
    usual, pure = COLOURS[colour]
    if rng.random() < 0.3:
        return pure
    jitter = 12 if colour in ("gray", "white", "black") else 18
    red, green, blue = (min(255, max(0, part + rng.randint(-jitter, jitter))) for part in usual)
    return red, green, blue


def render(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Image.Image]]:
    """The picture (RGB, of a random size), and for each thing the mask (L) of where it is."""
    width, height = _size(rng)
    picture = _ground(rng, shade(rng, scene.background), width, height)
    colours = {thing.colour: shade(rng, thing.colour) for thing in scene.things}
    smooth = rng.random() < 0.7
    # Things alike have one size and one angle each; digits one hand.
    masks = [_mask(thing, rng, width, height, smooth) for thing in scene.things]
    for thing, mask in zip(scene.things, masks):
        picture.paste(colours[thing.colour], mask=mask)
    return _worn(picture, rng), masks


def _size(rng: random.Random) -> tuple[int, int]:
    side = int(math.exp(rng.uniform(math.log(64), math.log(240))))
    if rng.random() < 0.6:
        return side, side
    other = max(52, int(side * rng.uniform(0.65, 1.0)))
    return (side, other) if rng.random() < 0.5 else (other, side)


def _ground(rng: random.Random, colour: tuple[int, int, int], width: int, height: int) -> Image.Image:
    if rng.random() < 0.8:
        return Image.new("RGB", (width, height), colour)
    slope = np.linspace(1.0, 1.0 - rng.uniform(0.04, 0.12), height)[:, None, None]
    pixels = np.broadcast_to(np.array(colour) * slope, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _worn(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Noise on some pictures, the artefacts of JPEG on others."""
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 12), (*picture.size[::-1], 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(40, 95))
        picture = Image.open(file).convert("RGB")
    return picture


def _mask(thing: Thing, rng: random.Random, width: int, height: int, smooth: bool) -> Image.Image:
    scale = 2 if smooth else 1
    radius = thing.radius * min(width, height) * scale
    x, y = thing.x * width * scale, thing.y * height * scale
    mask = Image.new("L", (width * scale, height * scale))
    if thing.kind not in DIGITS:
        _draw_shape(ImageDraw.Draw(mask), thing.kind, x, y, radius, rng)
    elif rng.random() < 0.5:
        _print_digit(mask, thing.kind, x, y, radius, rng)
    else:
        _write_digit(ImageDraw.Draw(mask), thing.kind, x, y, radius, rng)
    return mask.reduce(2) if smooth else mask


_TURN = {"square": 12, "triangle": 15, "star": 18, "heart": 12, "cross": 12}


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, rng: random.Random) -> None:
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    turn = math.radians(rng.uniform(-_TURN[kind], _TURN[kind])) if rng.random() < 0.6 else 0.0
    sin, cos = math.sin(turn) * radius, math.cos(turn) * radius
    draw.polygon([(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in _outline(kind, rng)], fill=255)


def _outline(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """Corners within a circle of radius 1, y downwards."""
    if kind == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if kind == "triangle":
        return [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
    if kind == "star":
        rays = [(math.pi * (i / 5 - 0.5), 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
        return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in rays]
    if kind == "heart":
        steps = [2 * math.pi * i / 48 for i in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5 - 0.1,
            )
            for t in steps
        ]
    thick = rng.uniform(0.24, 0.34)
    arm = [(-thick, -0.95), (thick, -0.95), (thick, -thick)]
    corners: list[tuple[float, float]] = []
    for quarter in range(4):
        sin, cos = (0, 1, 0, -1)[quarter], (1, 0, -1, 0)[quarter]
        corners += [(px * cos - py * sin, px * sin + py * cos) for px, py in arm]
    return corners


def _print_digit(mask: Image.Image, kind: str, x: float, y: float, radius: float, rng: random.Random) -> None:
    """A digit of Pillow's own font."""
    font = ImageFont.load_default(size=max(8.0, 2 * radius / 0.72))
    left, top, right, bottom = font.getbbox(kind)
    layer = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    weight = rng.choice((0, 0, 1, 2)) if radius > 14 else 0
    ImageDraw.Draw(layer).text((1 - left, 1 - top), kind, font=font, fill=255, stroke_width=weight)
    layer = layer.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC, expand=True)
    mask.paste(layer, (round(x - layer.width / 2), round(y - layer.height / 2)))


def _arc(x: float, y: float, across: float, down: float, start: float, stop: float) -> list[tuple[float, float]]:
    """Points of an ellipse's arc between two angles in degrees, clockwise from the right."""
    steps = [math.radians(start + (stop - start) * i / 14) for i in range(15)]
    return [(x + across * math.cos(angle), y + down * math.sin(angle)) for angle in steps]


_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [_arc(0, 0, 0.58, 0.95, -90, 270)],
    "1": [[(-0.35, -0.6), (0.05, -0.95), (0.05, 0.95)]],
    "2": [[*_arc(0, -0.45, 0.55, 0.5, -170, 30), (-0.6, 0.95), (0.62, 0.95)]],
    "3": [[*_arc(0, -0.48, 0.5, 0.46, -150, 80), *_arc(0, 0.46, 0.58, 0.5, -80, 150)]],
    "4": [[(0.25, 0.95), (0.25, -0.95), (-0.62, 0.35), (0.65, 0.35)]],
    "5": [[(0.5, -0.93), (-0.4, -0.93), (-0.46, -0.1), *_arc(0, 0.36, 0.56, 0.57, -125, 140)]],
    "6": [[*_arc(0.35, 0.3, 0.9, 1.25, -95, -170), *_arc(0, 0.42, 0.53, 0.53, -180, 180)]],
    "7": [[(-0.58, -0.93), (0.58, -0.93), (-0.12, 0.95)]],
    "8": [_arc(0, -0.48, 0.46, 0.46, 90, 450), _arc(0, 0.46, 0.55, 0.5, -90, 270)],
    "9": [[*_arc(0, -0.42, 0.53, 0.53, 0, 360), (0.53, -0.42), (0.42, 0.95)]],
}


def _write_digit(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, rng: random.Random) -> None:
    """A digit of strokes, slanted and stretched a little, as a hand would write it."""
    pen = max(1, round(radius * rng.uniform(0.14, 0.36)))
    slant, stretch = rng.uniform(-0.18, 0.3), rng.uniform(0.8, 1.15)
    inner = radius - pen / 2
    for stroke in _STROKES[kind]:
        wobble = [(rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02)) for _ in stroke]
        points = [
            (x + inner * ((px + dx) * stretch - slant * py), y + inner * (py + dy))
            for (px, py), (dx, dy) in zip(stroke, wobble)
        ]
        draw.line(points, fill=255, width=pen, joint="curve")
        for px, py in points:
            draw.ellipse((px - pen / 2, py - pen / 2, px + pen / 2, py + pen / 2), fill=255)
