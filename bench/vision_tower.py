"""How fast the CPU engine computes vision towers, beside transformers on the same tower.

    python -m bench.vision_tower [--towers siglip-b-512,qwen3-vl] [--types float32,bfloat16,int8] [--rounds 5]
        [--minutes 7.5]

Random weights of a published model's sizes are saved once, and both read them. In each round every contestant computes
one tile (or one image), one after the other; a figure is the median of the rounds, of which no further one begins once
a tower has used its part of the minutes. The share is that of the fastest product of large matrices on this machine,
ours or torch's, in the contestant's type (8 bits: in bfloat16). For ours it also says where the time
goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from inflight.checkpoint import open_model
from inflight.contract import Grid
from inflight.kernels import Format, Precision, TowerArrays, TowerProgram
from inflight.vision.towers.base import Prepared
from inflight.vision.towers.native_parts import NativeSettings
from inflight.vision.towers.native_tower import native_tower

TEXT = {"num_hidden_layers": 1, "vocab_size": 256, "pad_token_id": 0, "num_attention_heads": 8, "intermediate_size": 64}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A tower with its picture.

    Attributes:
        model: makes transformers' model.
        pixels: height and width.
        operations: arithmetic ones for the picture.
    """

    model: Callable[[], Any]
    pixels: tuple[int, int]
    operations: float


def encoder_operations(rows: int, hidden: int, inner: int, layers: int, patch: int, join: float) -> float:
    """Multiplications and additions of a plain encoder and of what joins it, which has `join` multiplications."""
    products = rows * (4 * hidden * hidden + 2 * hidden * inner)
    return 2.0 * (layers * (products + 2 * rows * rows * hidden) + rows * patch * hidden + join)


def siglip() -> Any:
    """SmolVLM-256M's tower."""
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT, "hidden_size": 576, "num_key_value_heads": 8},
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        scale_factor=4,
        image_token_id=200,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def qwen() -> Any:
    """Qwen3-VL-2B's tower."""
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "hidden_size": 2048,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "depth": 24,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


CASES = {
    "siglip-b-512": Case(siglip, (512, 512), encoder_operations(1024, 768, 3072, 12, 768, 64 * 16 * 768 * 576)),
    "qwen3-vl": Case(
        qwen,
        (480, 640),
        encoder_operations(1200, 1024, 4096, 24, 768, 4 * 300 * (4096 * 4096 + 4096 * 2048)),
    ),
}


def theirs(model: Any, pixels: np.ndarray, dtype: torch.dtype) -> Run:
    """transformers' tower and join, called on prepared pixels."""
    inner = model.model.to(dtype)
    if hasattr(model.config, "image_token_id") and model.config.model_type == "qwen3_vl":
        height, width = pixels.shape[1:]
        film = np.stack([pixels, pixels]).reshape(2, 3, height // 32, 2, 16, width // 32, 2, 16)
        cut = np.ascontiguousarray(film.transpose(2, 5, 3, 6, 1, 0, 4, 7)).reshape(-1, 3 * 2 * 16 * 16)
        values, grid = torch.from_numpy(cut).to(dtype), torch.tensor([[1, height // 16, width // 16]])
        return lambda: inner.get_image_features(values, grid)
    values = torch.from_numpy(pixels)[None, None].to(dtype)
    return lambda: inner.get_image_features(values)


def contestants(case: Case, folder: Path, threads: int, types: list[str]) -> dict[str, Run]:
    """By name, each with its weights loaded."""
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((3, *case.pixels), np.float32)
    torch.manual_seed(0)
    model = case.model()
    model.save_pretrained(folder)
    runs: dict[str, Run] = {}
    for name in types:
        if name == "int8":
            continue
        dtype = TYPES[name]
        other = type(model).from_pretrained(folder).eval()
        runs[f"transformers {name}"] = theirs(other, pixels, dtype)
    prepared = Prepared(Grid(1, 1), pixels[None], case.pixels)
    opened = open_model(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in types:
        settings = NativeSettings(threads, "float32" if name == "float32" else "bfloat16", int8=name == "int8")
        with opened.weights() as weights:
            tower = native_tower(config, weights, settings)
        assert tower is not None
        runs[f"ours {name}"] = partial(tower.run, prepared)
    return runs


def spent(run: Run) -> str:
    """The share of each kind of operation in one run of a tower of ours."""
    assert isinstance(run, partial)
    program = cast(Any, run.func).__self__._program  # of the bound method of a tower
    program.measure()
    run()
    seconds: Counter[str] = Counter()
    for code, each in program.seconds():
        seconds[code.name.lower()] += each
    total = sum(seconds.values())
    return ", ".join(f"{name} {each / total:.0%}" for name, each in seconds.most_common() if each > total / 200)


def products(threads: int, types: list[str]) -> dict[str, Run]:
    """Products of [1024, 4096] with [4096, 4096]; each is one run."""
    runs: dict[str, Run] = {}
    x, weight = np.ones((1024, 4096), np.float32), np.ones((4096, 4096), np.float32)
    for name, dtype in ((name, dtype) for name, dtype in TYPES.items() if name in types):
        left, right = torch.ones(1024, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
        runs[f"torch {name}"] = partial(torch.matmul, left, right.T)
        program = TowerProgram(threads, half=name != "float32")
        source, out = program.buffer(4096), program.buffer(4096)
        program.read(source, 0)
        form = Format.FLOAT if name == "float32" else Format.BF16
        program.multiply(source, out, program.product(weight, None, Precision(form)))
        run = TowerArrays([1024], [x], [[1024]])
        runs[f"ours {name}"] = partial(program.run, run)
    return runs


def medians(runs: dict[str, Run], rounds: int, until: float = float("inf")) -> tuple[dict[str, float], int]:
    """Seconds of each, in turn, and the number of rounds: at least one, and none begins after `until`."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() > until:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            with torch.inference_mode():
                run()
            if number:  # the first one reserves memory
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in seconds.items()}, max(map(len, seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", default=",".join(CASES))
    parser.add_argument("--types", default="float32,bfloat16,int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=7.5)
    arguments = parser.parse_args()
    began, towers = time.perf_counter(), arguments.towers.split(",")
    torch.set_num_threads(arguments.threads)
    types = arguments.types.split(",")
    seconds_of, _ = medians(products(arguments.threads, types), 5)
    speed = {name: 2 * 1024 * 4096**2 / each / 1e9 for name, each in seconds_of.items()}
    best = {name: max(speed[f"torch {name}"], speed[f"ours {name}"]) for name in TYPES if name in types}
    print("products: " + ", ".join(f"{name} {each:.0f} Gop/s" for name, each in speed.items()), flush=True)
    for index, name in enumerate(towers, 1):
        with tempfile.TemporaryDirectory() as folder:
            runs = contestants(CASES[name], Path(folder), arguments.threads, types)
        until = began + 60 * arguments.minutes * index / len(towers)
        found, rounds = medians(runs, arguments.rounds, until)
        print(f"\n{name}, {CASES[name].operations / 1e12:.2f} Top, {rounds} rounds")
        for contestant, seconds in found.items():
            form = "float32" if "float32" in contestant else "bfloat16"
            rate, base = CASES[name].operations / seconds / 1e9, found[f"transformers {form}"]
            share, times = rate / best[form], base / seconds
            print(f"  {contestant:22} {seconds:6.3f} s {rate:6.0f} Gop/s {share:5.0%} {times:5.2f}x", flush=True)
        for contestant in (contestant for contestant in found if contestant.startswith("ours")):
            print(f"  {contestant:22} {spent(runs[contestant])}", flush=True)


if __name__ == "__main__":
    main()
