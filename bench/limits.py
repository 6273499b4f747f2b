"""Measures this machine's limits: the read bandwidth of memory and oneDNN's rate of bfloat16 matrix products.

    python -m bench.limits [THREADS]

prints both as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

# Rows, inputs, outputs: shapes of prefill in small models, and shapes at which the library is fastest.
GEMM_SHAPES = ((128, 896, 4864), (512, 896, 4864), (1024, 896, 4864), (1024, 2048, 2048), (1024, 4096, 4096))
TRIES, SECONDS = 7, 0.3  # minima: a single try may be shorter than the machine's fluctuations


@dataclass(frozen=True)
class Limits:
    """Attributes:
    bandwidth: bytes read in a second.
    gemm: floating-point operations in a second, a multiplication and an addition counted as two.
    gemm_shape: rows, inputs and outputs of the fastest product.
    """

    bandwidth: float
    gemm: float
    gemm_shape: tuple[int, int, int]


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries."""
    times: list[float] = []
    while len(times) < TRIES or sum(times) < SECONDS:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def read_bandwidth(threads: int) -> float:
    """Bytes per second of a sum over 1 GiB, in huge pages if the system has them."""
    import torch

    torch.set_num_threads(threads)
    memory = mmap.mmap(-1, 1 << 30)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.int64)
    block.fill_(1)
    return float(block.nbytes / fastest(block.sum))


def gemm_rate(threads: int, rows: int, inputs: int, outputs: int) -> float:
    """Operations per second of oneDNN, with weights already in its own layout."""
    import torch

    torch.set_num_threads(threads)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    values = torch.randn(rows, inputs, dtype=torch.bfloat16)
    seconds = fastest(lambda: torch.ops.mkldnn._linear_pointwise(values, packed, None, "none", [], ""))
    return 2 * rows * inputs * outputs / seconds


def measure(threads: int) -> Limits:
    rates = {shape: gemm_rate(threads, *shape) for shape in GEMM_SHAPES}
    best = max(GEMM_SHAPES, key=rates.__getitem__)
    return Limits(read_bandwidth(threads), rates[best], best)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1))))
