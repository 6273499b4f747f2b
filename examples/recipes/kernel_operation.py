"""Tries the operation of kernel_operation.patch, as a test in tests/unit/test_native.py would: `clip`.

Runs in a tree that the patch was applied to and whose native module was built: scripts/try_operation.sh.
"""

from __future__ import annotations

import numpy as np
import pytest

from inflight.kernels import KvType, Layer, NativeProgram, StepArrays


def clipped(x: np.ndarray, limit: float, threads: int) -> np.ndarray:
    """The operation's answer for rows of float32 [n, width], by a program that does nothing else."""
    program = NativeProgram(threads)
    rows, width = x.shape
    source, out = program.buffer(width), program.buffer(width)
    program.embed(program.product(x), source)
    program.multiply(source, out, program.product(np.eye(width, dtype=np.float32)))
    program.clip(out, limit)  # type: ignore[attr-defined]  # the patch adds it
    program.layer(Layer(1, 1, 16, 1.0))
    blocks = -(-rows // 16)
    program.make_caches(blocks, 16, KvType.FLOAT)
    at = np.arange(rows)
    step = StepArrays(at, at, at, [rows], np.arange(blocks, dtype=np.int32)[None], at)
    return np.array(program.run(step, out, source).logits)


def main() -> None:
    random = np.random.default_rng(0)
    for rows, width, limit in ((1, 1, 0.5), (5, 33, 1.0), (17, 96, 0.1), (40, 7, 3.0)):
        x = random.standard_normal((rows, width)).astype(np.float32)
        crowd = clipped(x, limit, 1)
        assert np.array_equal(crowd, np.clip(x, -np.float32(limit), np.float32(limit)))
        assert np.array_equal(clipped(x, limit, 2), crowd), "the number of threads shows"
        alone = np.concatenate([clipped(x[row : row + 1], limit, 1) for row in range(rows)])
        assert np.array_equal(alone, crowd), "a row alone is another than in a crowd"
    with pytest.raises(ValueError, match="positive"):
        clipped(x, -1.0, 1)
    print("the operation of the recipe does what NumPy does")


if __name__ == "__main__":
    main()
