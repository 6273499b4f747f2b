"""What loading a model costs: time, and memory beside the packed weights.

    python -m bench.loading MODEL [--quantize int8] [--threads 2] [--rounds 3]

MODEL is a folder in Hugging Face tensors or a GGUF file. Each round is a process of its own, which loads the model for
the CPU engine and nothing else. `peak` is the most memory that the process held (VmHWM: pages of mapped files count)
less what it held before it began to load; `beside` is what of that is neither packed weights nor the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 300
"""Megabytes that loading may take besides the packed weights and one tensor."""


def status(key: str) -> int:
    """The value in bytes of a line in /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(f"{key}:"))


def largest_tensor(path: str) -> int:
    """Bytes of the largest product's tensors as they are stored, fused ones together."""
    from inflight.checkpoint import open_model
    from inflight.models.config import decoder_config
    from inflight.models.decoder_tensors import DecoderTensors, located

    model = open_model(path)
    config = decoder_config(model.config)
    if config is None:
        raise SystemExit(f"'{path}' is of a family that the engine does not have")
    with model.weights() as weights:
        config = located(config, weights, False)
        tensors = DecoderTensors(config)
        experts = config.experts is not None and config.experts.layers[0]
        names = ["embedding", "0.gate_up.0" if experts else "0.gate_up", "0.qkv"]
        if not config.tied:
            names.append("head")
        sizes = []
        for name in names:
            pieces = tensors.product(name).weights
            found = [weights.read(piece.name, piece.shape, piece.part) for piece in pieces]
            sizes.append(sum(_bytes(each) for each in found))
    return max(sizes)


def _bytes(weight: Any) -> int:
    """Bytes of a weight as it is stored; codes of 4 bits count as half a byte."""
    if hasattr(weight, "data") and hasattr(weight, "type"):
        return int(weight.data.nbytes)
    if hasattr(weight, "codes"):
        return int(weight.codes.size * weight.bits // 8 + weight.scales.nbytes)
    return int(weight.nbytes)


def load(path: str, threads: int, quantize: str) -> None:
    """Runs in the round's process: prints seconds, packed bytes and peak bytes."""
    import torch

    from inflight.config import ModelConfig
    from inflight.device import Alone
    from inflight.models import load_model

    job = ModelConfig(Path(path), device_type="cpu", threads=threads, quantize=quantize)
    before = status("VmRSS")
    began = time.perf_counter()
    model = load_model(job, Alone(), torch.device("cpu"))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "packed": model.weight_bytes, "peak": status("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        return load(given.model, given.threads, given.quantize)
    largest = largest_tensor(given.model)
    command = [sys.executable, "-m", "bench.loading", *sys.argv[1:], "--once"]
    rounds = []
    for _ in range(given.rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = sorted(each["seconds"] for each in rounds)[len(rounds) // 2]
    packed, peak = rounds[-1]["packed"], max(each["peak"] for each in rounds)
    beside = peak - packed - largest
    print(f"{given.model} ({given.quantize}): loaded in {seconds:.2f} s (median of {len(rounds)})")
    print(f"packed {packed / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    print(f"beside packed weights and one tensor {beside / 1e6:.0f} MB; at most {LIMIT} MB wanted")
    return None


if __name__ == "__main__":
    main()
