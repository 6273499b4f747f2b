"""Sampling of one step: the native library beside torch's operators, in turns in one run.

    python -m bench.sampling --threads 2 --rounds 7

Logits are normal with a deviation of 2.5 and twenty likelier tokens, as after a few words of text; sequences have 500
tokens. A round is one step of each; figures are medians over the rounds, in microseconds a row, without the copy that
gives every round fresh logits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from inflight.contract import Sampling
from inflight.kernels import SamplerRow, sample
from inflight.shard.sampler import RowState
from inflight.shard.torch_sampler import TorchSampler

VOCABULARIES = (32_000, 151_936, 262_144)
CASES: dict[str, dict[str, Any]] = {
    "greedy, log-probabilities": {"logprobs": True},
    "temperature": {"do_sample": True, "temperature": 0.8},
    "temperature, top-k 50, top-p": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "temperature, top-p": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "penalties, top-p": {
        "do_sample": True,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "top_p": 0.95,
    },
    "typical-p": {"do_sample": True, "typical_p": 0.9},
    "top 5 tokens": {"logprobs": True, "top_n_tokens": 5},
}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(size: int, count: int, given: dict[str, Any], threads: int, rounds: int) -> tuple[float, float]:
    """Microseconds per row, native and torch's."""
    random = np.random.default_rng(0)
    fresh = (random.standard_normal((count, size)) * 2.5).astype(np.float32)
    fresh[:, 100:120] += 8
    rows = [
        SamplerRow(Sampling(seed=i, **given), random.integers(0, size, 500).astype(np.int32), 250) for i in range(count)
    ]
    sampling = [row.sampling for row in rows]
    logits = fresh.copy()
    tensor = torch.from_numpy(logits)
    reference = TorchSampler()
    native: list[float] = []
    torchs: list[float] = []
    for _ in range(rounds):
        np.copyto(logits, fresh)
        native.append(seconds(lambda: sample(logits, rows, threads)))
        np.copyto(logits, fresh)
        torchs.append(
            seconds(lambda: reference.sample(tensor, sampling, lambda i: RowState(rows[i].tokens, rows[i].num_prompt)))
        )
    return statistics.median(native) / count * 1e6, statistics.median(torchs) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| vocabulary | rows | | native, µs a row | torch | times |\n|---|---|---|---|---|---|")
    for size in VOCABULARIES:
        for count in (1, 8):
            for name, given in CASES.items():
                native, torchs = measure(size, count, given, options.threads, options.rounds)
                print(
                    f"| {size:,} | {count} | {name} | {native:,.0f} | {torchs:,.0f} | {torchs / native:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
