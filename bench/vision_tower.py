"""How fast the CPU engine computes vision towers, beside transformers and llama.cpp on the same tower.

    python -m bench.vision_tower [--towers siglip-b,qwen3-vl] [--types float32,bfloat16,int8] [--rounds 5]
        [--minutes 7.5] [--llamacpp .venv-llamacpp]

Random weights of published sizes (bench/vision_cases.py) are saved once, and all read them: llama.cpp as the GGUF file
that its converter makes of them, in F16 beside our bfloat16 and in Q8_0 beside our int8. In each round every contestant
computes one picture, one after the other; a figure is the median of the rounds, of which no further one begins once a
tower has used its part of the minutes. The share is that of the fastest product of large matrices on this machine, ours
or torch's, in the contestant's type (8 bits: in bfloat16). For ours it also says where the time goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from bench.vision_cases import CASES, TYPES, Case, LlamaCpp, Run, ours, save, theirs
from inflight.kernels import Format, Precision, TowerArrays, TowerProgram


def contestants(case: Case, folder: Path, threads: int, types: list[str], llamacpp: Path | None) -> dict[str, Run]:
    """By name, each with its weights loaded."""
    save(case, folder)
    runs: dict[str, Run] = {}
    for name in types:
        if name in TYPES:
            runs[f"transformers {name}"] = theirs(case, folder, TYPES[name])
        if llamacpp is not None and name != "float32":
            kind = Type.Q8_0 if name == "int8" else Type.F16
            runs[f"llama.cpp {kind.name}"] = LlamaCpp(case, folder, kind, threads, llamacpp)
        runs[f"ours {name}"] = ours(case, folder, name, threads)
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


def report(case: Case, found: dict[str, float], best: dict[str, float]) -> None:
    """Prints each contestant's seconds, and the ratios of ours to the others of its type."""
    for contestant, seconds in found.items():
        name = contestant.split()[-1]
        form = "float32" if name == "float32" else "bfloat16"
        peers = {"bfloat16": ("transformers bfloat16", "llama.cpp F16"), "int8": ("llama.cpp Q8_0",)}
        rivals = peers.get(name, ("transformers float32",)) if contestant.startswith("ours") else ()
        ratios = ", ".join(f"{found[peer] / seconds:.2f} x {peer}" for peer in rivals if peer in found)
        rate = case.operations / seconds / 1e9
        print(f"  {contestant:22} {seconds:6.3f} s {rate:6.0f} Gop/s {rate / best[form]:5.0%}  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", default=",".join(CASES))
    parser.add_argument("--types", default="float32,bfloat16,int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--llamacpp", type=Path, help="the environment of bench/setup_cpu_peers.sh")
    arguments = parser.parse_args()
    began, towers = time.perf_counter(), arguments.towers.split(",")
    torch.set_num_threads(arguments.threads)
    types = arguments.types.split(",")
    seconds_of, _ = medians(products(arguments.threads, types), 5)
    speed = {name: 2 * 1024 * 4096**2 / each / 1e9 for name, each in seconds_of.items()}
    best = {name: max(speed[f"torch {name}"], speed[f"ours {name}"]) for name in TYPES if name in types}
    best.setdefault("bfloat16", best.get("float32", 0.0))
    print("products: " + ", ".join(f"{name} {each:.0f} Gop/s" for name, each in speed.items()), flush=True)
    for index, name in enumerate(towers, 1):
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            runs = contestants(case, Path(folder), arguments.threads, types, arguments.llamacpp)
            until = began + 60 * arguments.minutes * index / len(towers)
            found, rounds = medians(runs, arguments.rounds, until)
            for run in runs.values():
                if isinstance(run, LlamaCpp):
                    run.close()
        print(f"\n{name}: {case.told}, {case.operations / 1e12:.2f} Top, {rounds} rounds")
        report(case, found, best)
        for contestant in (contestant for contestant in found if contestant.startswith("ours")):
            print(f"  {contestant:22} {spent(runs[contestant])}", flush=True)


if __name__ == "__main__":
    main()
