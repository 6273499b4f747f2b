"""The CPU engine on llama.cpp's block types: near the floats that they stand for, the same numbers in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inflight.kernels import (
    BLOCK_TYPES,
    Activation,
    Format,
    KvType,
    Layer,
    NativeProgram,
    Norm,
    Precision,
    StepArrays,
    instruction_sets,
    native_reason,
)
from inflight.tensors import BFLOAT16, BLOCKS, Blocks, Weight
from tests.lm import on_sets

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

ISAS = instruction_sets()
Array = np.ndarray[Any, np.dtype[np.float32]]


def random_blocks(name: str, n: int, k: int, seed: int = 0) -> Blocks:
    """Random bytes; scales are finite, of both signs."""
    form = BLOCKS[name]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n * (k // form.values), form.bytes), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(name, (0, 2)):
        data[:, at : at + 2] = rng.uniform(-0.01, 0.01, (len(data), 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        data[:, 0] = rng.integers(110, 124, len(data))
    return Blocks(name, (n, k), data.reshape(n, -1))


def inputs(rows: int, k: int) -> Array:
    """Rows of different sizes, with some values that stand out, as in real models."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, k)) * rng.choice([0.01, 1.0, 30.0], size=(rows, 1))
    x[rng.random((rows, k)) < 0.01] *= 50
    return x.astype(np.float32)


class Multiplied:
    """Weights side by side, over an embedding that is `x` itself."""

    def __init__(
        self,
        x: Array,
        weights: list[Weight],
        isa: str | None = None,
        threads: int = 1,
        precision: Precision | None = None,
    ) -> None:
        self.program = NativeProgram(threads, isa)
        self.rows, k = x.shape
        self.source = self.program.buffer(k)
        self.program.embed(self.program.product(x), self.source)
        self.products = [self.program.product(weight, None, precision) for weight in weights]
        self.out = self.program.buffer(sum(weight.shape[0] for weight in weights))

    def run(self, rows: list[int] | None = None, out: int | None = None) -> Array:
        wanted = np.arange(self.rows) if rows is None else np.array(rows)
        self.program.layer(Layer(1, 1, 16, 1.0))
        self.program.make_caches(-(-self.rows // 16), 16, KvType.FLOAT)
        places = np.arange(len(wanted))
        tables = np.arange(-(-self.rows // 16), dtype=np.int32)[None]
        step = StepArrays(wanted, places, places, [len(wanted)], tables, places)
        return self.program.run(step, self.out if out is None else out, self.source).logits.copy()


def product(x: Array, weight: Weight, isa: str, threads: int = 1, rows: list[int] | None = None) -> Array:
    found = Multiplied(x, [weight], isa, threads)
    found.program.multiply(found.source, found.out, found.products)
    return found.run(rows)


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_product_is_near_that_of_the_floats(name: str, isa: str) -> None:
    """What is left is the rounding of activations, half a step of 127 in each 32 of them."""
    k = 768 if BLOCKS[name].values == 256 else 352
    weight, x = random_blocks(name, 75, k), inputs(45, k)
    floats = weight.dequantise().astype(np.float64)
    wanted = x.astype(np.float64) @ floats.T
    peaks = np.abs(x).reshape(len(x), -1, 32).max(axis=-1)
    sizes = np.abs(floats).reshape(len(floats), -1, 32).sum(axis=-1)
    bound = peaks @ sizes.T / 254 * 1.001 + 1e-6 * (np.abs(x) @ np.abs(floats).T)
    found = product(x, weight, isa)
    assert (np.abs(found - wanted) <= bound).all()
    # Bit for bit: alone, in other company, on two threads.
    for rows in ([0], [44], [3, 17, 20, 21, 22, 30, 31]):
        np.testing.assert_array_equal(product(x, weight, isa, rows=rows), found[rows])
    np.testing.assert_array_equal(product(x, weight, isa, threads=2), found)


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize(
    "kind",
    ["Q4_K", "Q6_K", "Q8_0", Precision(Format.GROUP4, 64), Precision(Format.GROUP8, 32), Precision(Format.INT8)],
    ids=str,
)
def test_a_row_is_the_same_among_any_number(kind: str | Precision, isa: str) -> None:
    """Sets of instructions take few rows by other ways than many; every number of rows meets one of them."""
    x = inputs(36, 512)
    weight: Weight = random_blocks(kind, 70, 512) if isinstance(kind, str) else inputs(70, 512).astype(BFLOAT16)
    found = Multiplied(x, [weight], isa, precision=None if isinstance(kind, str) else kind)
    found.program.multiply(found.source, found.out, found.products)
    alone = np.concatenate([found.run([row]) for row in range(len(x))])
    for count in range(2, len(x) + 1):
        np.testing.assert_array_equal(found.run(list(range(count))), alone[:count])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_an_embedding_is_what_the_blocks_stand_for(name: str) -> None:
    weight = random_blocks(name, 70, 256)
    for isa in (ISAS[0], "scalar"):
        program = NativeProgram(1, isa)
        x = program.buffer(256)
        program.embed(program.product(weight), x)
        program.layer(Layer(1, 1, 16, 1.0))
        program.make_caches(5, 16, KvType.FLOAT)
        tokens = np.array([0, 69, 31, 32])
        places = np.arange(4)
        step = StepArrays(tokens, places, places, [4], np.zeros((1, 5), np.int32), places)
        found = program.run(step, x, x).logits
        np.testing.assert_allclose(found, weight.dequantise()[tokens], rtol=1e-6, atol=1e-9)


def test_products_of_several_types_lie_side_by_side() -> None:
    """Each as it is alone, through a norm, on one thread and two, for few rows and for many."""
    k = 512
    weights: list[Weight] = [
        random_blocks("Q4_K", 64, k),
        random_blocks("Q6_K", 33, k),
        np.random.default_rng(3).normal(size=(20, k)).astype(np.float32),
        random_blocks("Q4_K", 7, k, seed=1),
        random_blocks("Q5_0", 40, k),
    ]
    ones = np.ones(k, np.float32)

    def multiplied(x: Array, chosen: list[Weight], threads: int) -> Array:
        found = Multiplied(x, chosen, threads=threads)
        norm = Norm(found.program.weight(ones), 1e-6)
        found.program.multiply(found.source, found.out, found.products, norm=norm)
        return found.run()

    for rows in (1, 3, 50):
        x = inputs(rows, k)
        alone = np.concatenate([multiplied(x, [weight], 1) for weight in weights], axis=1)
        for threads in (1, 2):
            np.testing.assert_array_equal(multiplied(x, weights, threads), alone)


def test_a_gate_is_what_a_gated_product_does() -> None:
    k, half = 512, 48
    gate, up = random_blocks("Q4_K", half, k), random_blocks("Q4_K", half, k, seed=1)
    x = inputs(20, k)
    apart = Multiplied(x, [gate, up])
    inner = apart.program.buffer(half)
    apart.program.multiply(apart.source, apart.out, apart.products)
    apart.program.gate(apart.out, inner, Activation.SILU)
    together = Multiplied(x, [])
    program = together.program
    inner_too = program.buffer(half)
    program.multiply(together.source, inner_too, program.product([gate, up], gated=True), act=Activation.SILU)
    np.testing.assert_array_equal(apart.run(out=inner), together.run(out=inner_too))


def test_packed_bytes_are_used_again_and_are_not_many_more() -> None:
    x = inputs(5, 512)
    for name in BLOCK_TYPES:
        weight = random_blocks(name, 64, 512)
        first = Multiplied(x, [weight])
        first.program.multiply(first.source, first.out, first.products)
        packed = first.program.packed(first.products[0])
        assert len(packed.data) <= 1.05 * weight.data.nbytes
        again = Multiplied(x, [])
        out = again.program.buffer(64)
        again.program.multiply(again.source, out, again.program.product_of(packed))
        np.testing.assert_array_equal(first.run(), again.run(out=out))


def test_what_does_not_fit_is_refused() -> None:
    program = NativeProgram(1)
    source, out, half = program.buffer(256), program.buffer(64), program.buffer(32)
    blocks, other = random_blocks("Q4_K", 32, 256), random_blocks("Q5_K", 32, 256)
    with pytest.raises(ValueError, match="one type"):
        program.product([blocks, other])
    one, gated = program.product(blocks), program.product([blocks, blocks], gated=True)
    with pytest.raises(ValueError, match="do not fit"):
        program.multiply(source, out, [one])
    with pytest.raises(ValueError, match="stands alone"):
        program.multiply(source, out, [gated, gated], act=Activation.SILU)
    wide, narrow = program.buffer(9 * 32), program.buffer(33)
    with pytest.raises(ValueError, match="at most 8"):
        program.multiply(source, wide, [one] * 9)
    with pytest.raises(ValueError, match="do not fit"):
        program.gate(out, narrow, Activation.SILU)
    program.gate(out, half, Activation.RELU)
