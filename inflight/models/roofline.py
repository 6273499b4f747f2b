"""Measures each operator of a model on the CPU engine, for comparison with the limits of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inflight.config import ModelConfig
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.models.base import ForwardBatch
from inflight.models.load import load_model
from inflight.models.native import NativeDecoder

BLOCK = 16


@dataclass(frozen=True)
class Load:
    """One kind of step: `rows` rows that each compute `tokens` tokens after `context` cached ones."""

    name: str
    rows: int
    tokens: int
    context: int


LOADS = (
    Load("decode, 1 row", 1, 1, 192),
    Load("decode, 8 rows", 8, 1, 192),
    Load("decode, 32 rows", 32, 1, 192),
    Load("decode, 1 row at 8,192", 1, 1, 8191),
    Load("prefill, 1,024 tokens", 1, 1024, 0),
)


@dataclass(frozen=True)
class Line:
    """An operator's share of a step: seconds of one step, bytes of weights or cache, arithmetic operations."""

    name: str
    seconds: float
    bytes: float
    operations: float


def open_model(folder: str | Path, threads: int, quantize: str = "none", kv_cache_dtype: str = "auto") -> NativeDecoder:
    """A model on the CPU engine, with a cache of 40,000 tokens.

    Raises:
        StartError: it runs on torch's operators.
    """
    settings = ModelConfig(
        Path(folder), device_type="cpu", threads=threads, quantize=quantize, kv_cache_dtype=kv_cache_dtype
    )
    model = load_model(settings, Alone(), open_device("cpu", 0))
    if not isinstance(model, NativeDecoder):
        raise StartError("the model does not run on the CPU engine")
    model.make_cache(40_000 // BLOCK, BLOCK)
    if model.state_bytes:
        model.make_states(max(load.rows for load in LOADS))
    return model


def step_of(load: Load, vocab_size: int) -> ForwardBatch:
    """Random tokens; every row has blocks of its own."""
    length = load.context + load.tokens
    blocks = -(-length // BLOCK)
    tables = np.arange(load.rows * blocks, dtype=np.int32).reshape(load.rows, blocks)
    positions = np.tile(np.arange(load.context, length), load.rows)
    rows = np.repeat(np.arange(load.rows), load.tokens)
    return ForwardBatch(
        token_ids=np.random.default_rng(0).integers(0, vocab_size, load.rows * load.tokens),
        positions=positions,
        slots=tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        query_lens=[load.tokens] * load.rows,
        context_lens=[length] * load.rows,
        block_tables=tables,
        block_size=BLOCK,
        num_decode=load.rows if load.tokens == 1 else 0,
        logits_at=np.arange(1, load.rows + 1) * load.tokens - 1,
        states=np.arange(load.rows),
    )


def measure(model: NativeDecoder, load: Load, seconds: float = 2.0) -> tuple[float, list[Line]]:
    """Seconds of a step, the median of as many as fit, and its operators, the largest first."""
    batch = step_of(load, model.vocab_size)
    model.forward(batch)
    times: list[float] = []
    model.measure(True)
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        model.forward(batch)
        times.append(time.perf_counter() - start)
    costs = model.costs()
    model.measure(False)
    lines: dict[str, Line] = {}
    for cost in costs:
        name = cost.name
        line = lines.get(name, Line(name, 0.0, 0.0, 0.0))
        count = len(times)
        lines[name] = replace(
            line,
            seconds=line.seconds + cost.seconds / count,
            bytes=line.bytes + cost.bytes / count,
            operations=line.operations + cost.operations / count,
        )
    return sorted(times)[len(times) // 2], sorted(lines.values(), key=lambda line: -line.seconds)


def report(
    folder: str | Path,
    threads: int = 2,
    quantize: str = "none",
    kv_cache_dtype: str = "auto",
    *,
    seconds_each: float = 2.0,
) -> str:
    """The table of all loads, as text; each is measured for `seconds_each`."""
    model = open_model(folder, threads, quantize, kv_cache_dtype)
    lines = [
        f"{model.family}, {model.isa}, {threads} threads, weights {model.weight_bytes / 1e6:.0f} MB ({quantize})",
        "",
    ]
    lines += ["| step | operator | ms | share | GB/s | GFLOP/s |", "|---|---|---|---|---|---|"]
    for load in LOADS:
        if load.context + load.tokens > model.max_positions:
            continue
        seconds, operators = measure(model, load, seconds_each)
        total = Line(
            "all",
            seconds,
            sum(line.bytes for line in operators if line.name not in ROWWISE),
            sum(line.operations for line in operators),
        )
        for line in (total, *operators):
            share = line.seconds / seconds
            bytes_rate = "" if line.name in ROWWISE else f"{line.bytes / line.seconds / 1e9:.1f}"
            rate = f"{line.operations / line.seconds / 1e9:.0f}" if line.operations else ""
            lines.append(
                f"| {load.name} | {line.name} | {line.seconds * 1e3:.3f} | {share:.1%} | {bytes_rate} | {rate} |"
            )
    return "\n".join(lines)


ROWWISE = ("embed", "rotate", "norm", "gather", "cap", "output_gate", "scale", "gate_by")
"""Operators that read hardly any weights or cache."""
