"""The types of weights: blocks against gguf's own arithmetic, integers against what they stand for."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from inflight.tensors import BFLOAT16, BLOCKS, Blocks, Quantised, quantise, stack, widened


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_stand_for_what_gguf_says(name: str) -> None:
    """Random bytes, with scales that are finite."""
    values, size = gguf.GGML_QUANT_SIZES[Type[name]]
    form = BLOCKS[name]
    assert (form.values, form.bytes) == (values, size)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (5, 3 * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(name, (0, 2)):
        blocks[:, at : at + 2] = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    found = Blocks(name, (5, 3 * values), data)
    wanted = dequantize(data, Type[name])
    assert found.dequantise().dtype == np.float32
    np.testing.assert_allclose(found.dequantise(), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.rows(1, 3).dequantise(), found.dequantise()[1:3])


def test_blocks_that_cannot_be() -> None:
    data = np.zeros((2, 18), np.uint8)
    for type, shape, problem in (
        ("Q4_7", (2, 32), "not known"),
        ("Q4_0", (2, 33), "do not divide"),
        ("Q4_0", (2, 64), "is no Q4_0 weight"),
    ):
        with pytest.raises(ValueError, match=problem):
            Blocks(type, shape, data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 48])
def test_integers_are_near_what_they_were_made_of(bits: int, group: int | None) -> None:
    weight = np.random.default_rng(1).normal(size=(9, 100)).astype(np.float32)
    found = quantise(weight, bits, group)
    step = np.repeat(np.abs(found.scales), found.group, axis=1)[:, :100]
    error = np.abs(found.dequantise() - weight)
    assert (error <= step * (0.51 if bits == 8 else 1.01)).all()
    both = stack([found.rows(0, 4), found.rows(4, 9)])
    np.testing.assert_array_equal(both.dequantise(), found.dequantise())
    offsets = Quantised(bits, found.group, found.codes, found.scales, found.scales * np.float32(2 ** (bits - 1)))
    np.testing.assert_allclose(offsets.dequantise(), found.dequantise(), atol=1e-5)
    with pytest.raises(ValueError, match="different schemes"):
        stack([found, offsets])


def test_floats_are_widened() -> None:
    narrow = np.array([1.5, -2.25], BFLOAT16)
    assert widened(narrow).tolist() == [1.5, -2.25]
    wide = np.ones(3, np.float32)
    assert widened(wide) is wide
