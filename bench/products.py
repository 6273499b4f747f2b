"""How fast the CPU engine multiplies, by type of weights and number of rows.

    python -m bench.products [--types Q4_K,Q6_K] [--rows 1,8,32,512] [--megabytes 600] [--threads 2]

Random weights of 4,096 by 4,096, as many as make the megabytes, go through one after the other, so that they come from
memory. A line has a type: for each number of rows the bytes of weights read and the operations done in a second (a
multiplication and an addition are two), and for one row the bytes of a file's blocks against those read.
"""

from __future__ import annotations

import argparse
import os

import numpy as np

from inflight.kernels import BLOCK_TYPES, Format, KvType, Layer, NativeProgram, Precision, StepArrays
from inflight.tensors import BFLOAT16, BLOCKS, Blocks, Weight

SIDE = 4096
FLOATS = {
    "BF16": None,
    "INT8": Precision(Format.INT8),
    "GROUP4": Precision(Format.GROUP4, 32),
    "GROUP8": Precision(Format.GROUP8, 32),
    "GROUP4/128": Precision(Format.GROUP4, 128),
    "GROUP8/128": Precision(Format.GROUP8, 128),
}


def random_blocks(name: str, n: int, k: int) -> Blocks:
    """Random codes with small scales."""
    form = BLOCKS[name]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (n * (k // form.values), form.bytes), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(name, (0, 2)):
        data[:, at : at + 2] = rng.uniform(-1e-4, 1e-4, (len(data), 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        data[:, 0] = 115
    return Blocks(name, (n, k), data.reshape(n, -1))


class Products:
    """Weights of one type in a program of their own."""

    def __init__(self, name: str, megabytes: int, threads: int) -> None:
        self.program = NativeProgram(threads)
        weight: Weight
        if name in FLOATS:
            weight = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32).astype(BFLOAT16)
            precision = FLOATS[name]
        else:
            weight, precision = random_blocks(name, SIDE, SIDE), None
        self.source, self.out = self.program.buffer(SIDE), self.program.buffer(SIDE)
        table = np.random.default_rng(1).normal(size=(64, SIDE)).astype(np.float32)
        self.program.embed(self.program.product(table), self.source)
        begin = self.program.bytes
        while self.program.bytes - begin < megabytes * 1_000_000:
            self.program.multiply(self.source, self.out, self.program.product(weight, None, precision))
        self.count = len(self.program.costs()) - 1
        self.size = self.program.bytes - begin
        self.file = self.count * weight.data.nbytes if isinstance(weight, Blocks) else self.size
        self.program.layer(Layer(1, 1, 16, 1.0))
        self.program.make_caches(64, 16, KvType.FLOAT)

    def seconds(self, rows: int) -> float:
        """Seconds for all products, the best of several runs."""
        positions = np.arange(rows)
        tables = np.arange(64, dtype=np.int32)[None]
        step = StepArrays(positions % 64, positions, positions, [rows], tables, positions[-1:])
        best = float("inf")
        for _ in range(5 if rows < 100 else 2):
            self.program.measure(True)
            self.program.run(step, self.out, self.source)
            best = min(best, sum(cost.seconds for cost in self.program.costs() if cost.name == "product"))
        return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join([*FLOATS, *BLOCK_TYPES]))
    parser.add_argument("--rows", default="1,8,32,512")
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    rows = [int(each) for each in arguments.rows.split(",")]
    print(f"{'type':10} {'/ file':>6} " + " ".join(f"{f'{each} rows':>22}" for each in rows))
    for name in arguments.types.split(","):
        products = Products(name, arguments.megabytes, arguments.threads)
        cells = []
        for each in rows:
            seconds = products.seconds(each)
            operations = 2 * SIDE * SIDE * each * products.count
            cells.append(f"{products.size / seconds / 1e9:7.1f} GB/s {operations / seconds / 1e9:6.0f} Gop")
        print(f"{name:10} {products.size / products.file:6.3f}", *(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
